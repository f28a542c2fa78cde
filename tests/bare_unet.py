"""What a bare U-Net as f_θ learns to draw: train_mnist.py, whose flags it takes, with f_θ = U (see UNet.forward).

python tests/bare_unet.py --batch_size 64 --num_training_steps 500 --output_dir output/bare
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_mnist
from unet import UNet


def bare(self, x, y_t, gamma):
    return self.u(x, y_t, torch.atan2((1 - gamma).sqrt(), gamma.sqrt())).float()


if __name__ == "__main__":
    UNet.forward = bare
    train_mnist.main()
