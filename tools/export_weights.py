"""The averaged weights of a checkpoint in half precision, for `load_model` and evaluate.py, an eighth of its size.

python tools/export_weights.py output/checkpoint.pt output/reference/4x/sr3.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils


@utils.errors_in_one_line()
def main() -> None:
    if len(sys.argv) != 3:
        raise utils.InputError(f"give a checkpoint and where its weights go, not {sys.argv[1:]}")
    checkpoint = utils.load_checkpoint(sys.argv[1])  # what drawing needs of it
    checkpoint["ema"] = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    utils.save_checkpoint(Path(sys.argv[2]), checkpoint)


if __name__ == "__main__":
    main()
