"""LLaVA on adaptive patches as a model of lmms-eval, for the benchmarks of the paper's table 4.

lmms_eval --model aptvit_llava --model_args pretrained=llava-hf/llava-1.5-7b-hf,thresholds=5.75 \\
    --tasks vqav2_val_lite,gqa,textvqa_val,scienceqa_img,pope,mme,mmbench_en,mmvet --batch_size 8
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from aptvit.vlm.llava import adapt_llava, from_pretrained, is_adaptive
from aptvit.vlm.prompts import make_prompt

__all__ = ["AptvitLlava"]


class AptvitLlava(lmms):
    """LLaVA-1.5 on adaptive patches; arguments are the ``--model_args`` of lmms-eval.

    Args:
        pretrained: A folder or a repository on the hub with a LLaVA-1.5, adaptive or not.
        thresholds: In bits, from fine to coarse, separated by slashes; negative for the uniform model.
        keep: Instead of thresholds: share of the visual tokens.
        scorer: As for `aptvit.adapt`.
        revision: Revision of the repository on the hub.
        device: Device to run on; by default that of accelerate for this process.
        dtype: Type of the weights.
        batch_size: Questions per batch.

    Raises:
        ValueError: If there are neither thresholds nor ``keep`` for a model that is not adaptive, or options for an
            adaptive model.
    """

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        thresholds: str | float | None = None,
        keep: float | None = None,
        scorer: str | None = None,
        revision: str = "main",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        self.batch_size = int(batch_size)
        options: dict[str, Any] = {"keep": keep, "scorer": scorer}
        if thresholds is not None:
            options["thresholds"] = tuple(float(number) for number in str(thresholds).split("/"))
        options = {name: value for name, value in options.items() if value is not None}
        if is_adaptive(pretrained):
            if options:
                raise ValueError(f"{pretrained} has its own {', '.join(options)}: leave them out of --model_args")
            model, self.processor = from_pretrained(pretrained, dtype=dtype)
        else:
            if not {"thresholds", "keep"} & options.keys():
                raise ValueError("name thresholds=5.75 or keep=0.5 in --model_args; thresholds=-1 is the uniform model")
            host = LlavaForConditionalGeneration.from_pretrained(pretrained, revision=revision, dtype=dtype)
            host_processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
            model, self.processor = adapt_llava(host, host_processor, **options)
        self.model = model.eval().to(self.device)
        self.processor.tokenizer.padding_side = "left"
        self.visual_tokens = self.num_images = 0

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def _images(self, doc_to_visual: Any, task: str, split: str, doc_id: Any) -> list[Any]:
        return [image.convert("RGB") for image in doc_to_visual(self.task_dict[task][split][doc_id]) or []]

    def _inputs(self, prompts: Sequence[str], images: Sequence[Any]) -> Any:
        inputs = self.processor(images=list(images) or None, text=list(prompts), padding=True, return_tensors="pt")
        self.num_images += len(images)
        self.visual_tokens += int((inputs["input_ids"] == self.processor.image_token_id).sum())
        return inputs.to(self.device, self.model.dtype)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers to questions; generates the longest questions first."""

        def length_first(arguments: tuple) -> tuple[int, str]:
            return -len(self.tokenizer.encode(arguments[0])), arguments[0]

        ordered = utils.Collator([request.args for request in requests], length_first, grouping=True)
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as bar:
            for batch in ordered.get_batched(n=self.batch_size, batch_fn=None):
                answers += self._answer(batch)
                bar.update(len(batch))
        if self.num_images:
            logger.info(f"visual tokens per image: {self.visual_tokens / self.num_images:.1f}")
        return ordered.get_original(answers)

    @torch.inference_mode()
    def _answer(self, batch: Sequence[tuple]) -> list[str]:
        prompts, images = [], []
        for question, _, doc_to_visual, doc_id, task, split in batch:
            images_of_question = self._images(doc_to_visual, task, split, doc_id)
            prompts.append(make_prompt(self.processor, question, len(images_of_question)))
            images += images_of_question
        settings = dict(batch[0][1])
        until = settings.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        sampled = bool(settings.get("do_sample", settings.get("temperature", 0)))
        options = {"max_new_tokens": 1024, "num_beams": 1, "do_sample": sampled}
        allowed = ("max_new_tokens", "num_beams", *(("temperature", "top_p") if sampled else ()))
        options |= {name: settings[name] for name in allowed if settings.get(name) is not None}
        inputs = self._inputs(prompts, images)
        out = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]
        for number, (request, text) in enumerate(zip(batch, texts, strict=True)):
            for end in until:
                text = text.split(end)[0] if end else text
            texts[number] = text
            self.cache_hook.add_partial("generate_until", (request[0], request[1]), text)
        return texts

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log probability of each answer, and whether greedy decoding would give it."""
        results = []
        for question, target, doc_to_visual, doc_id, task, split in tqdm([request.args for request in requests]):
            document = self.task_dict[task][split][doc_id]
            answer = target if isinstance(target, str) else target(document)
            images = self._images(doc_to_visual, task, split, doc_id)
            prompt = make_prompt(self.processor, question, len(images))
            start = self._inputs([prompt], images)["input_ids"].shape[1]
            inputs = self._inputs([f"{prompt} {answer}"], images)
            logits = self.model(**inputs).logits[0, start - 1 : -1].float()
            ids = inputs["input_ids"][0, start:]
            likelihood = logits.log_softmax(-1).gather(1, ids[:, None]).sum()
            results.append((float(likelihood), bool((logits.argmax(-1) == ids).all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: LLaVA-1.5's benchmarks have one round.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("aptvit_llava answers in one round: choose a task of output_type generate_until")
