"""A run: its folder, and what is due after a training step: a row of the log, pictures, the checkpoint."""

import csv
import io
import os
import signal
import sys
from contextlib import ExitStack

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two runs out of one folder
    fcntl = None

LOG_EVERY = 100  # steps between two rows of the log
# What a new run moves aside.
RESULTS = "checkpoint.pt log.csv progress.png refinement-*.png [hls]r-*.png results.md comparison.png".split()
PLACE = ("num_images", "step", "log", "samples", "loss_sum")  # what a checkpoint tells of where a run is
RESUMED = ("config", "model", "ema", "optimizer", *PLACE)  # what a run needs to go on
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # Windows has no SIGHUP


def load_checkpoint(path, parts=("config", "step", "ema")):
    """These parts of what `save_checkpoint` wrote, on the CPU. Raises InputError where they can't be had."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {part: checkpoint[part] for part in parts}
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = f"{type(error).__name__}; it needs {', '.join(parts)}"
        raise InputError(f"{path} is no checkpoint to use here ({reason}): give another one") from None


def save_checkpoint(path, checkpoint):
    """Writes nested dictionaries of tensors and plain values: at every moment the file is the old or the new one."""
    buffer, beside = io.BytesIO(), path.with_name(f"{path.name}.tmp")
    torch.save(checkpoint, buffer)  # straight to a full disk it would raise RuntimeError
    beside.write_bytes(buffer.getvalue())
    os.replace(beside, path)


class Run:
    """A run in its folder: `steps` goes through the training, `after` writes what is due after a step.

    `parts` are the modules and the optimizer that a checkpoint keeps, and `num_images` says how many images there are
    for training and for testing. `samples` are the first eight samples of each grid, by step, and `loss_sum` is the sum
    of the losses since the last row of the log. A run that doesn't go on from a checkpoint moves the files of an
    earlier one to a folder earlier-1, earlier-2, …. Raises InputError where another run is in the folder, or the
    numbers of images are not the checkpoint's. Of several ranks only the first writes.
    """

    received = None  # the number of the signal that asks to stop

    def __init__(self, folder, config, parts, num_images, checkpoint):
        self.folder, self.config, self.parts = folder, config, parts
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        start = {"num_images": num_images, "step": 0, "log": [], "samples": {}, "loss_sum": 0.0}
        for name in PLACE:
            setattr(self, name, (checkpoint or start)[name])
        if num_images != self.num_images:
            raise InputError(f"there are {num_images} images, not {self.num_images}: a resumed run must keep its data")
        options = parts["optimizer"].param_groups  # this run's, with the tensor that is its learning rate
        for name, part in parts.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
        parts["optimizer"].param_groups = options
        for weights, moments in parts["optimizer"].state.items():  # fused Adam wants both alike in memory
            moments |= {name: torch.empty_like(weights).copy_(moments[name]) for name in ("exp_avg", "exp_avg_sq")}
        if self.is_first:
            self.take_folder()

    def take_folder(self):
        """Makes the folder, keeps other runs out of it, and moves the files of an earlier run aside."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")  # until the process ends
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            number = 1
            while (aside := self.folder / f"earlier-{number}").exists():
                number += 1
            for path in [path for name in RESULTS for path in self.folder.glob(name) if not self.step]:
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
            self.write_log()  # a resumed run's may be older than its checkpoint
        except OSError as error:
            reason = "another run writes to it" if isinstance(error, BlockingIOError) else error.strerror
            raise InputError(f"{self.folder} can't be used ({reason}); give another --output_dir") from None

    def steps(self):
        """The steps that are left, with a bar. Ctrl-C, SIGTERM and SIGHUP are left to `after`, which saves and ends."""
        last = self.config.num_training_steps
        self.bar = tqdm(range(self.step + 1, last + 1), initial=self.step, total=last, disable=not self.is_first)
        with ExitStack() as at_the_end:  # puts the handlers of before back
            for number in STOPPING:
                # Under nohup SIGHUP is ignored, and stays so. Several ranks would stop after different steps.
                if signal.getsignal(number) != signal.SIG_IGN and not dist.is_initialized():
                    at_the_end.callback(signal.signal, number, signal.signal(number, self.receive))
            for self.step in self.bar:
                yield self.step
        print(f"all {self.step} steps are done; to judge the model: python evaluate.py {self.folder / 'checkpoint.pt'}")

    def receive(self, number, _):
        self.received = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the script at once

    def after(self, loss, draw):
        """Writes what is due after a step; `draw` writes a grid and returns its metrics.

        After a signal it saves and ends the script. What can't be written is named, and tried again when it is next
        due; in the end it is an InputError. So is a loss or a weight that isn't finite, which is never saved.
        """
        if not self.is_first:
            return
        step, config = self.step, self.config
        self.loss_sum = self.loss_sum + loss
        is_last = step == config.num_training_steps
        is_grid = is_last or step in config.early_samples or step % config.sample_every == 0
        is_row = is_grid or step % LOG_EVERY == 0
        is_stopped = self.received and not is_last  # a signal that comes from here on waits for the next step
        if not (is_row or is_stopped):
            return
        if not sum([self.loss_sum, *(weights.sum() for weights in self.parts["model"].parameters())]).isfinite():
            raise InputError(f"loss or weights not finite after step {step}, nothing is saved: lower --learning_rate")
        try:
            if is_row:
                mean_loss = self.loss_sum / (step - (self.log[-1]["step"] if self.log else 0))
                numbers = {"loss": mean_loss} | (draw() if is_grid else {})
                self.log.append({"step": step} | {name: f"{number:.6g}" for name, number in numbers.items()})
                self.bar.set_postfix(loss=self.log[-1]["loss"])
                self.loss_sum = 0.0
            if is_grid or is_stopped:
                self.save()
            self.write_log()
        except OSError as error:
            reason = f"{self.folder} can't be written to ({error.strerror or error})"
            if is_last or is_stopped:
                raise InputError(f"{reason}; make room, or give another --output_dir") from None
            print(f"\n{reason}; going on", file=sys.stderr)
        if is_stopped:
            self.bar.close()
            print(f"stopped after step {step}; the same command with --resume goes on from there")
            raise SystemExit(128 + self.received)

    def write_log(self):
        with open(self.folder / "log.csv", "w") as file:
            columns = max(self.log, key=len, default=())  # a row with a grid has all of them
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.log)

    def save(self):
        """Writes the checkpoint."""
        place = {name: getattr(self, name) for name in PLACE}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.folder / "checkpoint.pt", {"config": vars(self.config)} | place | states)
