from kernel_fixtures import (  # noqa: F401
    check_entropy,
    compile_for_gpu,
    draw_images,
    entropy_by_numpy,
    entropy_triton,
    gather_triton,
    triton_device,
)
