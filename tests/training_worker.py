"""A small training run as a process of its own, to be killed or joined by another."""

import sys
from pathlib import Path

import torch

from kandinsky.clip_training import CLIPObjective
from kandinsky.config import CLIPImageConfig, CLIPTextConfig, MoVQConfig
from kandinsky.datasets import Shapes
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from kandinsky.movq import MoVQ
from kandinsky.movq_training import MoVQObjective
from kandinsky.prompts import PromptTokenizer
from kandinsky.training import Settings, Trainer, initialize, processes


def movq_objective() -> MoVQObjective:
    movq = initialize(MoVQ(MoVQConfig((32, 32), 1, num_vq_embeddings=20, norm_num_groups=16)), 0)
    return MoVQObjective(movq, Shapes(0, 16), Shapes(1, 16))


def clip_objective(tokenizer: Path) -> CLIPObjective:
    prompts = PromptTokenizer.from_pretrained(tokenizer)
    image = initialize(CLIPImageEncoder(CLIPImageConfig(32, 8, 32, 1, 2, 64, 32)), 0)
    text = initialize(CLIPTextEncoder(CLIPTextConfig(len(prompts), 77, 32, 1, 2, 64, 32)), 1)
    return CLIPObjective(image, text, prompts, Shapes(0, 32), {"fresh": Shapes(1, 32)})


def main(kind: str, folder: str, steps: str, batch_size: str, tokenizer: str = "") -> None:
    torch.set_num_threads(1)
    objective = movq_objective() if kind == "movq" else clip_objective(Path(tokenizer))
    settings = Settings(int(steps), int(batch_size), warmup=1, save_every=2, sample_every=1000)
    with processes("cpu") as device:
        Trainer(objective, settings, Path(folder), device).run(progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
