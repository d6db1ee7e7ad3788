"""Write the photos that scikit-image and scikit-learn install into a folder: python examples/sample_photos.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

from aptvit.files.sample_photos import sample_photos, write_sample_photos

__all__ = ["sample_photos"]

if __name__ == "__main__":
    write_sample_photos(Path(sys.argv[1]))
