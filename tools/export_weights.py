"""The averaged weights of a checkpoint in half precision, for `load_model`, evaluate.py and sample.py.

python tools/export_weights.py output/checkpoint.pt output/reference/8x/sr3.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.errors import Parser, one_line_errors
from support.output import load_checkpoint, save_checkpoint


@one_line_errors()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("weights", metavar="WEIGHTS", help="the file to write")
    flags = parser.parse_args()
    checkpoint = load_checkpoint(flags.checkpoint)
    weights = {name: weight.contiguous().half() for name, weight in checkpoint["ema"].items()}
    state = {"config": checkpoint["config"], "step": checkpoint["step"], "ema": weights}
    save_checkpoint(Path(flags.weights), state)


if __name__ == "__main__":
    main()
