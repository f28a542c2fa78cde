"""The averaged weights of a checkpoint in half precision, for `load_model`, evaluate.py and sample.py.

python tools/export_weights.py output/checkpoint.pt output/reference/8x/sr3.pt
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
    weights = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    state = {"config": vars(checkpoint["config"]), "step": checkpoint["step"], "ema": weights}
    utils.save_checkpoint(Path(sys.argv[2]), state)


if __name__ == "__main__":
    main()
