"""Training: the loop's promises, and each loss against an independent computation."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler as TheirDDPM
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from transformers import CLIPTokenizer

from kandinsky import (
    MoVQ,
    Prior,
    UNet,
    datasets,
    decoder_training,
    embedding_cache,
    images,
    prior_training,
    shapes,
    training_cli,
    vocabulary,
)
from kandinsky.clip_training import ConvEncoder, recolor, scene_labels
from kandinsky.config import CLIPImageConfig, MoVQConfig, UNetConfig
from kandinsky.datasets import Folder, Samples, Shapes, read_picture, shuffled, with_holes
from kandinsky.decoder_training import DecoderObjective, Painter, decoder_loss, widen
from kandinsky.embedding_cache import Cache, build_cache, digest, tokenizer_digest
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.images import to_pil
from kandinsky.judge import see
from kandinsky.movq_training import Discriminator, MoVQObjective, adversarial_losses, spot_loss
from kandinsky.optimize import optimize
from kandinsky.prior_training import PriorObjective, deepen, prior_loss
from kandinsky.prompts import END, START
from kandinsky.random_weights import SIZES_2_1
from kandinsky.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky.shapes import OBJECT_WEIGHTS
from kandinsky.training import Draws, Settings, Trainer, checkpoint_blocks, initialize, save_as, tile
from kandinsky.unet import AttentionBlock, ResnetBlock
from kandinsky.vocabulary import write_tokenizer
from tests.helpers import randn, relative_l2
from tests.small import (
    EMBEDDING_DIM,
    ours,
    reference_movq,
    reference_prior,
    reference_text_encoder,
    reference_unet,
)
from tests.training_worker import clip_objective, movq_objective

ROOT = Path(__file__).resolve().parents[1]


def start_worker(*args, **environment) -> subprocess.Popen:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "tests.training_worker", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=known, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "training" / "state.safetensors")


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same_gradients(ours_: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    a, b = gradients(ours_), gradients(theirs)
    assert a.keys() == b.keys() and a
    whole = torch.cat([g.flatten() for g in b.values()]).norm()
    for name, gradient in b.items():
        error = (a[name] - gradient).norm() / gradient.norm().clamp(min=1e-4 * whole)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    steps, whole = 40, start_worker("movq", tmp_path / "whole", 40, 2)
    finish(whole)
    kills = 0
    for _ in range(3):
        process = start_worker("movq", tmp_path / "killed", steps, 2)
        metrics = tmp_path / "killed" / "training" / "metrics.jsonl"
        before = metrics.read_text() if metrics.exists() else ""
        for _ in range(6000):
            if process.poll() is not None or (metrics.exists() and len(metrics.read_text()) > len(before)):
                break
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stderr.close()
    finish(start_worker("movq", tmp_path / "killed", steps, 2))
    whole, killed = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert kills >= 2 and whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    write_tokenizer(Shapes(0, 8).load(list(range(200))).captions, tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    pair = [start_worker("clip", tmp_path / "two", 3, 4, tokenizer, RANK=str(r), **address) for r in (0, 1)]
    one = start_worker("clip", tmp_path / "one", 3, 8, tokenizer)
    for process in (*pair, one):
        finish(process)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.keys() == two.keys()
    first = [name for name in one if name.startswith("exp_avg.")]
    assert all(relative_l2(two[name], one[name]) <= 1e-3 for name in first if one[name].norm() > 1e-6)


def test_prior_loss_has_the_gradients_of_diffusers_networks_under_the_published_objective():
    reference = reference_prior()
    prior = ours(Prior, reference)
    b, n, d = 4, 77, EMBEDDING_DIM
    x0, noise, t = randn(b, d, seed=1), randn(b, d, seed=2), torch.tensor([0, 10, 500, 990])
    text = {"embeds": randn(b, d, seed=3), "states": randn(b, n, d, seed=4)}
    text["mask"] = torch.arange(n)[None] < torch.tensor([2, 9, 77, 30])[:, None]
    prior_loss(prior, UnCLIPScheduler(), x0, noise, t, text).backward()

    x = TheirDDPM(beta_schedule="squaredcos_cap_v2").add_noise(x0, noise, t)
    out = reference(x, t, text["embeds"], text["states"], text["mask"]).predicted_image_embedding
    ((out - x0) ** 2).mean().backward()
    assert_same_gradients(prior, reference, 1e-4)


def test_several_noises_for_a_caption_weigh_as_single_ones():
    prior, b, n = ours(Prior, reference_prior()), 3, 9
    x0, noise = randn(b, EMBEDDING_DIM, seed=1), randn(2 * b, EMBEDDING_DIM, seed=2)
    t = torch.tensor([0, 990, 10, 500, 40, 700])
    text = {"embeds": randn(b, EMBEDDING_DIM, seed=3), "states": randn(b, n, EMBEDDING_DIM, seed=4)}
    text["mask"] = torch.arange(n)[None] < torch.tensor([2, 9, 5])[:, None]
    halves = [prior_loss(prior, UnCLIPScheduler(), x0, noise[i::2], t[i::2], text) for i in (0, 1)]
    together = prior_loss(prior, UnCLIPScheduler(), x0, noise, t, text)
    torch.testing.assert_close(together, sum(halves) / 2)
    seen = []
    objective = PriorObjective(prior, UnCLIPScheduler(), small_cache(), small_cache(), num_noises=4)
    prior.time_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        objective.loss(objective.batch([0, 1]), Draws("0", slice(None), 2))
    assert torch.equal(torch.cat(seen).flatten() // 250, torch.tensor([0, 1, 2, 3] * 2))


def test_captions_read_in_groups_of_like_length_give_the_loss_of_one_batch(monkeypatch):
    tower, losses = ours(CLIPTextEncoder, reference_text_encoder(0)), []
    for text_encoder in (None, tower):
        objective = PriorObjective(
            ours(Prior, reference_prior()), UnCLIPScheduler(), small_cache(), small_cache(), num_noises=2
        )
        objective.text_encoder, read = text_encoder, []
        prefill = objective.prior.prefill
        objective.prior.prefill = lambda *text: (read.append(text[2]), prefill(*text))[1]
        for groups in (1, 4):
            monkeypatch.setattr(prior_training, "LENGTHS", groups)
            with torch.no_grad():
                losses.append(objective.loss(objective.batch(range(9)), Draws("0", slice(None), 9))[0])
        torch.testing.assert_close(losses[-1], losses[-2])
        sizes = [mask.numel() for mask in read]
        assert len(sizes) == 1 + 3 and sum(sizes[1:]) < sizes[0]  # 9 rows are three groups of 3


def test_the_text_tower_can_be_trained_with_the_prior(tmp_path):
    """Its gradient is that of reading the ids, and the tower is written beside the prior."""
    cache, tower = small_cache(), ours(CLIPTextEncoder, reference_text_encoder(0))
    objective = PriorObjective(
        ours(Prior, reference_prior()), UnCLIPScheduler(), cache, cache, text_encoder=tower
    )
    batch = objective.batch([0, 1, 2, 3])
    objective.loss(batch, Draws("0", slice(None), 4))[0].backward()
    used = tower.text_model.embeddings.token_embedding.weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert set(used.tolist()) <= {*batch["text_ids"].flatten().tolist(), 0, 8, 9} and len(used) > 4
    objective.save(tmp_path)
    written = CLIPTextEncoder.from_pretrained(tmp_path / "text_encoder")
    assert torch.equal(written.text_projection.weight, tower.text_projection.weight)
    with torch.no_grad():
        before = objective.sample(Draws("1", slice(None), 64))[1]["cosine"]
        tower.text_projection.weight.zero_()
        assert objective.sample(Draws("1", slice(None), 64))[1]["cosine"] != before


def independent_bound(betas, x0, x, t, eps, variance):
    """The variational bound's terms with torch.distributions, in float64, sample by sample."""
    betas, terms = betas.double(), []
    levels = torch.cumprod(1 - betas, dim=0)
    for row, step in enumerate(t.tolist()):
        beta, level = betas[step], levels[step]
        before = levels[step - 1] if step else torch.tensor(1.0).double()
        clean, noisy = x0[row].double(), x[row].double()
        guess = (noisy - (1 - level) ** 0.5 * eps[row].double()) / level**0.5

        def mean_of(start):
            weight = before**0.5 * beta / (1 - level)
            return weight * start + (1 - beta) ** 0.5 * (1 - before) / (1 - level) * noisy

        posterior = max(step, 1)  # at 0 the posterior has no variance; the published code takes that of 1
        smallest = betas[posterior] * (1 - levels[posterior - 1]) / (1 - levels[posterior])
        share = (variance[row].double() + 1) / 2
        std = (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp()
        model = Normal(mean_of(guess), std)
        if step:
            terms.append(kl_divergence(Normal(mean_of(clean), smallest**0.5), model).mean())
            continue
        upper = torch.where(clean > 0.999, torch.ones_like(clean), model.cdf(clean + 1 / 255))
        lower = torch.where(clean < -0.999, torch.zeros_like(clean), model.cdf(clean - 1 / 255))
        terms.append(-(upper - lower).clamp(min=1e-12).log().mean())
    return torch.stack(terms).mean() / np.log(2)


def test_decoder_loss_has_the_gradients_of_diffusers_networks_under_the_published_objective():
    reference = reference_unet()
    unet = ours(UNet, reference)
    x0, noise, t = (
        randn(4, 4, 8, 8, seed=1).clamp(-1, 1),
        randn(4, 4, 8, 8, seed=2),
        torch.tensor([0, 1, 400, 999]),
    )
    image_embeds = randn(4, EMBEDDING_DIM, seed=3)
    error, bound = decoder_loss(unet, DDPMScheduler(), x0, noise, t, image_embeds)
    (error + bound).backward()

    theirs = TheirDDPM(beta_start=0.00085, beta_end=0.012)
    x = theirs.add_noise(x0, noise, t)
    out = reference(x, t, None, added_cond_kwargs={"image_embeds": image_embeds}).sample
    eps, variance = out.split(4, dim=1)
    their_bound = independent_bound(theirs.betas, x0, x, t, eps.detach(), variance)
    (((eps - noise) ** 2).mean() + their_bound).backward()
    assert abs(bound.item() / their_bound.item() - 1) <= 1e-4
    assert_same_gradients(unet, reference, 1e-4)


def test_decoder_loss_of_2_1_has_the_gradients_of_diffusers_network():
    form = {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_image_proj"}
    form |= {"addition_embed_type": "text_image", "cross_attention_dim": EMBEDDING_DIM}
    reference = reference_unet(**form)
    unet, t = ours(UNet, reference), torch.tensor([3, 900])
    x0, noise, image_embeds = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, EMBEDDING_DIM, seed=2)
    texts = {
        "text_embeds": randn(2, EMBEDDING_DIM, seed=3),
        "text_states": randn(2, 77, 48, seed=4),
    }
    decoder_loss(unet, DDPMScheduler(), x0, noise, t, image_embeds, **texts)[0].backward()
    x = TheirDDPM(beta_start=0.00085, beta_end=0.012).add_noise(x0, noise, t)
    added = {"image_embeds": image_embeds, "text_embeds": texts["text_embeds"]}
    out = reference(x, t, texts["text_states"], added_cond_kwargs=added).sample
    ((out[:, :4] - noise) ** 2).mean().backward()
    assert_same_gradients(unet, reference, 1e-4)


def test_sample_pictures_have_the_size_of_the_training_ones(monkeypatch):
    few = partial(decoder_training.draw_latents, num_steps=2)
    monkeypatch.setattr(decoder_training, "draw_latents", few)
    unet, movq = ours(UNet, reference_unet()), ours(MoVQ, reference_movq())
    size = 2 * unet.config.sample_size * movq.config.downscale
    painter = Painter(movq, Shapes(0, size).load(range(12)), randn(12, EMBEDDING_DIM))
    with torch.no_grad():
        given = DDPMScheduler(), torch.zeros(1, EMBEDDING_DIM), Draws("0", slice(None), 64)
        grid, measured = painter(unet, *given)
    assert grid.shape == (2, 12, 3, size, size) and "readable" in measured


def test_sample_pictures_are_drawn_in_rows_as_they_would_be_at_once(monkeypatch):
    unet, movq, decoded = ours(UNet, reference_unet()), ours(MoVQ, reference_movq()), []
    few = partial(decoder_training.draw_latents, num_steps=2)
    monkeypatch.setattr(decoder_training, "draw_latents", few)
    painter = Painter(movq, Shapes(0, 16).load(range(24)), randn(24, EMBEDDING_DIM))
    movq.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    given = unet, DDPMScheduler(), torch.zeros(1, EMBEDDING_DIM)
    grids = []
    for row in (12, 24):
        monkeypatch.setattr(decoder_training, "ROW", row)
        with torch.no_grad():
            grids.append(painter(*given, Draws("0", slice(None), 64))[0][1::2].flatten(0, 1))
    assert relative_l2(*grids) <= 1e-5 and decoded == [12, 12, 24]


def test_where_the_image_is_dropped_2_1_reads_the_empty_prompt(monkeypatch):
    cache = small_cache()
    texts = {"decoder_text_embeds": randn(12, EMBEDDING_DIM), "decoder_text_states": randn(12, 77, 48)}
    empty = {
        "empty_decoder_text_embeds": randn(1, EMBEDDING_DIM, seed=5),
        "empty_decoder_text_states": randn(1, 77, 48, seed=6),
    }
    cache.tensors |= texts | empty
    given = {}

    def loss(unet, scheduler, x0, noise, t, image_embeds, **entrance):
        given.update(entrance, image_embeds=image_embeds)
        return x0.mean(), x0.mean()

    monkeypatch.setattr(decoder_training, "decoder_loss", loss)
    unet = UNet(SIZES_2_1["small"].unet)
    objective = DecoderObjective(unet, DDPMScheduler(clip_sample=False), cache, torch.zeros(1, EMBEDDING_DIM))
    objective.loss(objective.batch(list(range(12)) * 8), Draws("0", slice(None), 96))
    dropped = (given["image_embeds"] == 0).all(dim=1)
    assert 2 <= dropped.sum() <= 40
    for name in ("text_embeds", "text_states"):
        is_empty = (given[name] == empty[f"empty_decoder_{name}"]).flatten(1).all(dim=1)
        assert torch.equal(is_empty, dropped)


def test_the_bound_teaches_the_variance_alone():
    unet = ours(UNet, reference_unet())
    inputs = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([3, 700]), randn(2, EMBEDDING_DIM)
    decoder_loss(unet, DDPMScheduler(), *inputs)[1].backward()
    assert unet.conv_out.weight.grad[:4].abs().max() == 0 < unet.conv_out.weight.grad[4:].abs().max()


def small_cache(count: int = 12) -> Cache:
    lengths = torch.arange(count) % 5 + 2
    return Cache(
        {
            "image_embeds": randn(count, EMBEDDING_DIM),
            "latents": randn(count, 4, 8, 8),
            "text_embeds": 1 + randn(count, EMBEDDING_DIM, seed=1),
            "text_states": randn(int(lengths.sum()), EMBEDDING_DIM, seed=2),
            "text_lengths": lengths,
            "text_ids": torch.arange(int(lengths.sum())) % 7,
            "empty_ids": torch.tensor([8, 9]),
            "empty_embeds": torch.zeros(1, EMBEDDING_DIM),
            "empty_states": torch.zeros(2, EMBEDDING_DIM),
        }
    )


def test_texts_and_embeddings_are_dropped_in_a_tenth():
    cache, seen = small_cache(), []
    prior = ours(Prior, reference_prior())
    prior.embedding_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective = PriorObjective(prior, UnCLIPScheduler(), cache, cache)
    with torch.no_grad():
        for step in range(20):
            batch = objective.batch(list(range(64)))
            objective.loss(batch, Draws(str(step), slice(None), 64))
    dropped = torch.cat(seen).eq(0).all(dim=1).float().mean().item()
    assert 0.07 < dropped < 0.13

    zero, seen = torch.full((1, EMBEDDING_DIM), 7.0), []
    unet = ours(UNet, reference_unet())
    unet.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    objective = DecoderObjective(unet, DDPMScheduler(), cache, zero)
    with torch.no_grad():
        for step in range(10):
            objective.loss(objective.batch(list(range(64))), Draws(str(step), slice(None), 64))
    assert 0.06 < torch.cat(seen).eq(7).all(dim=1).float().mean().item() < 0.14


def test_normalised_embeddings_have_mean_zero_and_variance_one():
    cache = small_cache(200)
    cache.tensors["image_embeds"] = cache["image_embeds"] * 3 + 5
    objective = PriorObjective(ours(Prior, reference_prior()), UnCLIPScheduler(), cache, cache)
    objective.normalize_by(cache)
    prior = objective.prior
    x = (cache["image_embeds"] - prior.clip_mean) / prior.clip_std
    assert x.mean(dim=0).abs().max() < 1e-5 and (x.std(dim=0) - 1).abs().max() < 1e-5
    torch.testing.assert_close(prior.denormalize(x), cache["image_embeds"])


@pytest.mark.filterwarnings("error")
def test_one_picture_can_be_normalised():
    cache = small_cache(1)
    objective = PriorObjective(ours(Prior, reference_prior()), UnCLIPScheduler(), cache, cache)
    objective.normalize_by(cache)
    assert torch.equal(objective.prior.clip_mean, cache["image_embeds"])
    assert objective.loss(objective.batch([0, 1]), Draws("0", slice(None), 2))[0].isfinite()


def test_packed_captions_come_back_padded_and_in_a_new_order_each_round():
    cache = small_cache()
    rows = cache.rows(list(range(12)), "image_embeds", "text")
    order = [shuffled(i, 12) for i in range(24)]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert sorted(shuffled(i, 12, seed=2**64 - 1) for i in range(12)) == list(range(12))  # any seed will do
    ends = cache["text_lengths"].cumsum(dim=0).tolist()
    for row, source in enumerate(order[:12]):
        start, end = ends[source] - int(cache["text_lengths"][source]), ends[source]
        assert torch.equal(rows["text_states"][row][rows["text_mask"][row]], cache["text_states"][start:end])
        assert torch.equal(rows["image_embeds"][row], cache["image_embeds"][source])


def test_another_seed_is_another_order(tmp_path):
    folder = write_folder(tmp_path / "pictures", 8)
    args = ["--out", "no", "--data", str(folder), "--size", "8", "--seed"]
    orders = []
    for seed in ("0", "0", "1", "2"):
        parser = ArgumentParser()
        training_cli.add_training_flags(parser)
        data = training_cli.data_of(parser.parse_args([*args, seed]))
        cache = small_cache(8)
        cache.seed = int(seed)
        orders.append(
            (data.load(range(8)).captions, cache.rows(range(8), "image_embeds")["image_embeds"].tolist())
        )
    for a, b, c, d in zip(*orders):
        assert a == b != c != d != a and sorted(a) == sorted(c) == sorted(d)
    today = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert orders[0][1] == small_cache(8)["image_embeds"][today].tolist()
    encode = lambda samples: {"image_embeds": samples.pixels.mean(dim=(2, 3))}  # noqa: E731
    made, read = (build_cache(data, 8, tmp_path / "cache", encode, progress=False, seed=2) for _ in range(2))
    assert torch.equal(*(cache.rows(range(8), "image_embeds")["image_embeds"] for cache in (made, read)))


def test_a_tokenizers_digest_is_of_the_files_that_make_ids(tmp_path):
    found = [tokenizer_digest(tmp_path)]
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "sentencepiece.bpe.model"):
        (tmp_path / name).write_text("a")
        found.append(tokenizer_digest(tmp_path))
    assert len(set(found)) == 5
    (tmp_path / "tokenizer_config.json").write_text("a")
    assert tokenizer_digest(tmp_path) == found[-1]


def test_a_cache_made_from_something_else_is_refused(tmp_path):
    encode = lambda samples: {"image_embeds": samples.pixels.mean(dim=(2, 3))}  # noqa: E731
    path, movq = tmp_path / "cache", movq_objective().movq
    sets = Shapes(3, 16), Folder(write_folder(tmp_path / "pictures", 4), 16)
    for data in sets:
        path.unlink(missing_ok=True)

        def build(data=data, count=4, encoder=digest(movq)):
            return build_cache(data, count, path, encode, progress=False, made_from={"encoder": encoder})

        assert torch.equal(build()["image_embeds"], build()["image_embeds"])
        moved = Folder(shutil.copytree(tmp_path / "pictures", tmp_path / f"moved {data}"[:30]), 16)
        assert data is sets[0] or torch.equal(build(moved)["image_embeds"], build()["image_embeds"])
        others = (
            Shapes(4, 16),
            Shapes(3, 8),
            Shapes(3, 16, object_weights=(0, 1, 0)),
            Folder(moved.folder, 16, seed=1),
        )
        for other in others:
            with pytest.raises(ValueError, match="not known to be made from the same data; delete it, or"):
                build(other)
        with pytest.raises(ValueError, match="cache is not known to be made from the same count; delete it"):
            build(count=3)
        with pytest.raises(ValueError, match="the same encoder;"):
            build(encoder=digest(initialize(movq_objective().movq, 7)))
        with pytest.raises(ValueError, match="the same encoder;"):  # the file says more than is asked
            Cache.read(path, made_from={"data": repr(data), "count": 4})
    assert digest(movq) == digest(movq_objective().movq.half())
    save_file({"image_embeds": torch.zeros(4, 3)}, path)
    with pytest.raises(ValueError, match="the same encoder, data, count; delete it"):
        build()


def test_of_several_processes_one_encodes(tmp_path, monkeypatch):
    given, waits = (Shapes(3, 16), 4, tmp_path / "cache"), []

    def first(seconds: float) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "0")
            encode = lambda samples: {"image_embeds": samples.pixels}  # noqa: E731
            waits.append(build_cache(*given, encode, progress=False))

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(embedding_cache.time, "sleep", first)
    second = build_cache(*given, lambda samples: 1 / 0, progress=False)
    assert len(waits) == 1 and torch.equal(second["image_embeds"], waits[0]["image_embeds"])


def test_samples_made_by_other_processes_in_other_batches_are_encoded_alike(tmp_path):
    def encode(samples: Samples) -> dict[str, torch.Tensor]:
        return {"image_embeds": samples.pixels.mean(dim=(2, 3)), "empty_embeds": torch.ones(1, 3)}

    ways = [{"workers": 0}, {"workers": 2, "batch_size": 3}]
    caches = [
        build_cache(Shapes(3, 16), 8, tmp_path / str(i), encode, progress=False, **way).tensors
        for i, way in enumerate(ways)
    ]
    embeds = [cache["image_embeds"] for cache in caches]
    assert torch.equal(*embeds) and len(embeds[0].unique(dim=0)) == 8
    assert all(cache["empty_embeds"].shape == (1, 3) for cache in caches)  # the empty prompt's, once


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_another_process_is_said_in_one_line(tmp_path, workers):
    class Broken:
        def load(self, indices: list[int]) -> Samples:
            raise ValueError(f"no picture {indices[0]}")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="^no picture 0$"):
        build_cache(Broken(), 4, tmp_path / "cache", dict, progress=False, workers=workers)
    assert torch.equal(torch.get_rng_state(), before) and not (tmp_path / "cache").exists()


def test_a_deepened_prior_starts_as_the_one_it_came_from():
    prior = ours(Prior, reference_prior())
    deeper = deepen(prior, 2, seed=1)
    assert len(deeper.transformer_blocks) == len(prior.transformer_blocks) + 2
    text = randn(2, EMBEDDING_DIM), randn(2, 5, EMBEDDING_DIM, seed=1), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        given = randn(2, EMBEDDING_DIM, seed=2), torch.tensor([5, 800]), *text
        torch.testing.assert_close(deeper(*given), prior(*given))
    deeper(*given).sum().backward()
    for block in deeper.transformer_blocks[-2:]:
        assert (
            block.ff.net[2].weight.grad.abs().sum() > 0 and block.attn1.to_out[0].weight.grad.abs().sum() > 0
        )


@pytest.mark.parametrize("entrance", [(9, False), (8, True)])
def test_a_widened_unet_starts_as_the_one_it_came_from(entrance):
    sizes = {"block_out_channels": (32, 48), "layers_per_block": 1, "head_dim": 8, "norm_num_groups": 8}
    sizes |= {"context_dim": 24, "embedding_dim": EMBEDDING_DIM}
    unet = initialize(UNet(UNetConfig(**sizes)), 1)
    wide = widen(unet, initialize(UNet(UNetConfig(in_channels=entrance[0], hint=entrance[1], **sizes)), 2))
    x, t, embeds = randn(2, 4, 8, 8), torch.tensor([5, 800]), randn(2, EMBEDDING_DIM)
    hint = randn(2, 3, 64, 64) if entrance[1] else None
    more = x if entrance[1] else torch.cat([x, randn(2, 5, 8, 8, seed=1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(wide(more, t, embeds, hint), unet(x, t, embeds))


@pytest.mark.parametrize("entrance", [(9, False), (8, True)])
def test_inpainting_and_hint_decoders_learn_their_entrance(entrance):
    sizes = {"block_out_channels": (32, 48), "layers_per_block": 1, "head_dim": 8, "norm_num_groups": 8}
    config = UNetConfig(*entrance[:1], hint=entrance[1], context_dim=24, embedding_dim=EMBEDDING_DIM, **sizes)
    cache = small_cache()
    if entrance[1]:
        cache.tensors["hint"] = randn(12, 3, 64, 64).half()
    else:
        cache.tensors["known"] = randn(12, 5, 8, 8).half()
    objective = DecoderObjective(
        initialize(UNet(config), 0), DDPMScheduler(), cache, torch.zeros(1, EMBEDDING_DIM)
    )
    objective.loss(objective.batch([0, 1, 2, 3]), Draws("0", slice(None), 4))[0].backward()
    assert objective.unet.conv_in.weight.grad[:, 4:].abs().amax(dim=(0, 2, 3)).min() > 0


def test_holes_show_something_else_and_the_rest_stays():
    for data in (Shapes(3).load(list(range(40))), Samples(randn(40, 3, 24, 24), [""] * 40)):
        samples = with_holes(data, Random(7))
        inside = samples.holes.bool().expand(-1, 3, -1, -1)
        assert torch.equal(samples.pixels, data.pixels)
        assert torch.equal(samples.before[~inside], samples.pixels[~inside])
        changed = ((samples.before - samples.pixels).abs().amax(dim=1) > 0.2).flatten(1)
        assert changed.any(dim=1).float().mean() > 0.9
        assert 0.02 < samples.holes.mean(dim=(1, 2, 3)).min() and samples.holes.mean() < 0.5
        assert torch.equal(with_holes(data, Random(7)).before, samples.before)


def test_a_hole_never_shows_the_picture_itself():
    picture = randn(3, 24, 24)
    for pixels in (
        picture[None],
        picture.expand(2, -1, -1, -1),
        torch.stack([picture, picture, -2 * picture]),
    ):
        samples = with_holes(Samples(pixels, [""] * len(pixels)), Random(1))
        inside = samples.holes.bool().expand(-1, 3, -1, -1)
        assert (samples.before[inside] - samples.pixels[inside]).abs().mean() > 0.5


def test_holes_of_shapes_are_mostly_one_objects():
    samples = with_holes(Shapes(3).load(list(range(80))), Random(7))
    removed = 0
    for scene, before in zip(samples.scenes, samples.before):
        picture = to_pil(before[None] / 2 + 0.5)[0]
        now = see(picture).objects
        kept = sum(any(a.color == b.color and a.shape == b.shape for b in now) for a in scene.objects)
        removed += len(now) == len(scene.objects) and kept == len(scene.objects) - 1
    assert removed > 0.6 * 80


def test_a_patch_of_another_colour_costs_more_than_edges_of_the_same_error():
    pixels, spot, edges = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    spot[0, :, 24:, :8] = 0.5
    edges[0, :, ::2, :8], edges[0, :, 1::2, :8] = 0.25, -0.25  # as much squared error
    assert edges.square().sum() == spot.square().sum()
    torch.testing.assert_close(spot_loss(spot, pixels), torch.tensor(0.25 / 2))  # of one picture in two
    assert spot_loss(edges, pixels) < 1e-6
    corner = torch.zeros(1, 3, 18, 18)
    corner[..., -2:, -2:] = 1
    assert (
        spot_loss(corner, 0 * corner) > 0.01 and spot_loss(corner[..., :2, :2] + 1, corner[..., :2, :2]) == 1
    )
    movq = ours(MoVQ, reference_movq())
    data = Shapes(0, 32)
    with torch.no_grad():
        losses = [
            MoVQObjective(movq, data, data, spots=weight).loss(
                {"pixels": data.load([0, 1]).pixels}, Draws("0", slice(None), 2)
            )
            for weight in (0.0, 3.0)
        ]
    torch.testing.assert_close(losses[1][0] - losses[0][0], 3 * losses[0][1]["spot"])


def test_discriminator_and_autoencoder_each_learn_from_their_own_loss():
    discriminator = initialize(Discriminator(8), 0)
    out, pixels = randn(4, 3, 16, 16).requires_grad_(), randn(4, 3, 16, 16, seed=1)
    fooled, own = adversarial_losses(discriminator, out, pixels)
    fooled.backward()
    assert out.grad.abs().max() > 0 and all(p.grad is None for p in discriminator.parameters())
    better = discriminator((out - out.grad / out.grad.norm()).detach()).mean()
    assert better > discriminator(out).mean()  # the autoencoder's gradient leads to what looks real
    out.grad = None
    own.backward()
    assert out.grad is None and discriminator.layers[0].weight.grad.abs().max() > 0


def test_checkpointing_changes_no_gradient():
    plain, saving = ours(UNet, reference_unet()), ours(UNet, reference_unet())
    checkpoint_blocks(saving, ResnetBlock, AttentionBlock)
    inputs = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([3, 700]), randn(2, EMBEDDING_DIM)
    for unet in (plain, saving):
        sum(decoder_loss(unet, DDPMScheduler(), *inputs)).backward()
    assert_same_gradients(saving, plain, 1e-6)
    assert saving.state_dict().keys() == plain.state_dict().keys()


def test_rate_rises_stays_and_falls_to_zero():
    settings = Settings(steps=1000, learning_rate=2.0, warmup=100, decay=0.2)
    assert settings.rate(0) == 0.02 and settings.rate(99) == settings.rate(500) == settings.rate(800) == 2.0
    assert settings.rate(900) == pytest.approx(1.0) and settings.rate(999) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps is 0; allowed is 1 and more"),
        ({"warmup": -1}, "warmup is -1; allowed is 0 and more"),
        ({"max_norm": 0.0}, "max_norm is 0.0; allowed is 1e-09 and more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; allowed is 0 and more"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; allowed is 0 and more"),
        ({"beta2": 1.0}, "beta2 is 1.0; allowed is 0 to 0.99"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; a finite number is needed"),
        ({"ema": 2.0}, "ema is 2.0; allowed is 0 to 1"),
    ],
)
def test_settings_that_train_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_accumulated_batches_are_the_mean_of_both_and_are_clipped_together(tmp_path):
    settings = Settings(1, 2, accumulate=2)
    trainer = Trainer(movq_objective(), settings, tmp_path / "a")
    halves = [trainer.objective.batch([0, 1]), trainer.objective.batch([2, 3])]
    wanted = {name: 0.0 for name in trainer.weights}
    for part, batch in enumerate(halves):
        trainer.objective.loss(batch, trainer._draws(f"0 {part}"))[0].backward()
        for name, p in trainer.weights.items():
            wanted[name] = wanted[name] + p.grad / 2
            p.grad = None
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm().item()
    trainer.settings = replace(settings, max_norm=norm / 2)
    assert trainer.train_step(halves)["gradient"].item() == pytest.approx(norm, rel=1e-4)
    for name, p in trainer.weights.items():  # the first moment is a tenth of the gradient after one step
        assert relative_l2(trainer.optimizer.state[p]["exp_avg"] * 20, wanted[name]) <= 1e-4


def test_an_optimized_network_is_not_trained(tmp_path):
    objective = movq_objective()
    optimize(objective.movq)
    with pytest.raises(ValueError, match="an optimized network is for drawing"):
        Trainer(objective, Settings(1, 2), tmp_path)


def test_steps_and_their_parts_see_each_sample_once(tmp_path):
    objective = movq_objective()
    objective.batch = lambda indices: {"indices": indices}
    trainer = Trainer(objective, Settings(3, 2, accumulate=2), tmp_path)
    trainer.step = 1
    with ThreadPoolExecutor(1) as ahead:
        steps = [[batch["indices"] for batch in batches] for batches in islice(trainer._batches(ahead), 2)]
    assert steps == [[[4, 5], [6, 7]], [[8, 9], [10, 11]]]


def test_a_run_that_is_taken_up_again_gives_the_same_bits_and_forgets_what_came_after_its_save(tmp_path):
    metrics = tmp_path / "again" / "training" / "metrics.jsonl"
    for folder, steps in ("whole", 4), ("again", 2), ("again", 4):
        objective, settings = movq_objective(), Settings(steps, 2, warmup=3, decay=0.0, seed=5)
        objective.sample = objective.save = lambda _: (None, {})
        Trainer(objective, settings, tmp_path / folder).run(progress=False)
        if steps == 2:
            with open(metrics, "a") as file:  # as a kill may leave it
                file.write('{"step": 3, "loss": 0.1}\n{"step": 4, "lo')
    whole, again = state(tmp_path / "whole"), state(tmp_path / "again")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]


def test_matrices_alone_decay_and_spatial_norms_start_as_plain_ones(tmp_path):
    trainer = Trainer(movq_objective(), Settings(weight_decay=0.1), tmp_path)
    groups = [({p.ndim > 1 for p in g["params"]}, g["weight_decay"]) for g in trainer.optimizer.param_groups]
    assert groups == [({True}, 0.1), ({False}, 0.0)]
    shifts = [p for name, p in trainer.weights.items() if name.endswith("conv_y.bias")]
    assert shifts and all((p == 1).all() for p in shifts)


def test_sample_grids_are_clamped_and_stand_in_rows():
    grid = torch.tensor([[0.5, 2.0, -1.0]])[..., None, None, None].expand(2, 3, 3, 1, 1)
    sheet = tile(grid)
    assert sheet.shape == (3, 6, 9) and sheet[0, 1].tolist() == [1, 0.5, 1, 1, 1, 1, 1, 0, 1]
    assert torch.equal(sheet[:, :3], sheet[:, 3:]) and (sheet[:, 0] == 1).all()


def test_a_state_of_another_model_is_refused(tmp_path):
    trainer = Trainer(movq_objective(), Settings(2, 2, save_every=1), tmp_path)
    trainer.run(progress=False)
    trainer.weights.popitem()
    with pytest.raises(ValueError, match="another model"):
        trainer.load()


def test_the_average_follows_the_weights_faster_at_first(tmp_path):
    trainer = Trainer(movq_objective(), Settings(2, 2, 1, 0.01, warmup=1, ema=0.15), tmp_path)
    wanted = {name: p.detach().clone() for name, p in trainer.weights.items()}
    for trainer.step, decay in enumerate((1 / 10, 0.15)):
        trainer.train_step([trainer.objective.batch([0, 1])])
        wanted = {name: decay * x + (1 - decay) * trainer.weights[name] for name, x in wanted.items()}
    torch.testing.assert_close(trainer.average, wanted)


def test_the_average_is_what_is_drawn_with_and_written(tmp_path):
    objective, drawn = movq_objective(), []
    objective.sample = lambda _: (drawn.append(objective.movq.decoder.conv_out.weight.clone()), {})
    Trainer(objective, Settings(3, 2, warmup=1, learning_rate=0.01), tmp_path).run(progress=False)
    written = MoVQ.from_pretrained(tmp_path / "movq").state_dict()
    saved = state(tmp_path)
    for name, tensor in written.items():
        assert torch.equal(tensor, saved[f"average.movq.{name}"])
    assert torch.equal(written["decoder.conv_out.weight"], drawn[-1])
    assert not torch.equal(written["decoder.conv_out.weight"], objective.movq.decoder.conv_out.weight)


def write_folder(folder: Path, count: int = 8) -> Path:
    folder.mkdir()
    batch = Shapes(5).load(range(count))
    lines = []
    for i, (picture, text) in enumerate(zip(batch.pixels, batch.captions)):
        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_folder_reports_and_leaves_out_what_it_cannot_read(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures", 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "none.png", "text": "x"}\nnot json\n{"text": "no name"}\n')
    data = Folder(folder, 32)
    assert len(data) == 2 and capsys.readouterr().err.count("left out") == 4
    samples = data.load([0, 1])
    assert samples.pixels.shape == (2, 3, 32, 32) and samples.pixels.abs().max() <= 1
    with pytest.raises(ValueError, match="no readable picture"):
        Folder((tmp_path / "empty").mkdir() or tmp_path / "empty", 32)


def test_a_caption_that_is_no_text_is_reported_and_left_out(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures", 1)
    texts = ({"text": None}, {}, {"text": 7}, {"text": "half \ud83d"}, {"text": "a\u2028b"})
    lines = [json.dumps({"file_name": "0.png", **text}, ensure_ascii=False) for text in texts]
    written = "\ufeff" + "\n".join(reversed(lines)) + "\n"
    (folder / "metadata.jsonl").write_bytes(written.encode("utf-8", "surrogatepass") + b'"\xff"\n')
    assert Folder(folder, 8).load([0]).captions == ["a\u2028b"]
    shown = capsys.readouterr().err
    assert shown.count("left out: metadata.jsonl line") == 5 and "text is a NoneType" in shown


def test_a_text_beside_a_picture_that_cannot_be_read_is_left_out_by_name(tmp_path, capsys):
    for name in ("bad", "folder", "marked"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "marked.txt").write_bytes("\ufeffa cat".encode())
    data, shown = Folder(tmp_path, 8), capsys.readouterr().err
    assert data.load([0]).captions == ["a cat"] and len(data) == 1
    assert "bad.txt cannot be read" in shown and "folder.txt cannot be read" in shown


def test_a_small_folder_is_measured_each_picture_once(tmp_path):
    data = Folder(write_folder(tmp_path / "pictures", 5), 32)
    write_tokenizer(data.captions(range(5)), tmp_path / "tokenizer")
    objective = clip_objective(tmp_path / "tokenizer")
    objective.fresh = {"own": data}
    objective.heads.pop("scene")
    assert "own nearest of 5" in objective.sample(Draws("0", slice(None), 64))[1]
    movq = movq_objective()
    movq.fresh = data
    assert movq.sample(Draws("0", slice(None), 64))[0].shape == (3, 5, 3, 32, 32)


def test_a_teacher_reads_pictures_of_any_size():
    for size in (8, 24, 64):
        teacher = ConvEncoder(replace(CLIPImageConfig(), image_size=size, projection_dim=16))
        assert teacher(randn(2, 3, size, size)).shape == (2, 16)


def test_captions_are_those_of_the_samples_and_need_no_picture(tmp_path, monkeypatch):
    sets = Folder(write_folder(tmp_path / "pictures", 5), 8, seed=3), Shapes(2, 8, "held_out")
    loaded = [data.load(list(range(7))).captions for data in sets]
    for room, name in ((datasets, "read_picture"), (shapes, "render")):
        monkeypatch.setattr(room, name, lambda *_: 1 / 0)
    assert [data.captions(list(range(7))) for data in sets] == loaded


def test_folder_reads_captions_beside_pictures_and_crops_the_middle(tmp_path, capsys):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a white\nsquare\n", encoding="utf-8-sig")  # as some editors write
    Image.fromarray(picture).save(tmp_path / "lonely.png")
    samples = Folder(tmp_path, 16).load([0])
    assert samples.captions == ["a white square"] and samples.pixels[..., 1:-1].min() > 0.999
    assert "lonely.png has no caption" in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "lonely.png", "caption": "a square"}')
    assert Folder(tmp_path, 16).load([0]).captions == ["a square"]


def test_hints_are_read_beside_pictures_and_are_no_pictures(tmp_path, capsys):
    for name, level in (("cat.jpg", 90), ("cat.hint.png", 51), ("dog.png", 90)):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / name)
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert len(Folder(tmp_path, 8)) == 2 and capsys.readouterr().err == ""
    data = Folder(tmp_path, 8, hints=True)
    assert len(data) == 1 and "dog.png has no hint" in capsys.readouterr().err
    samples = data.load([0])
    assert samples.captions == ["cat"] and samples.hints.shape == (1, 3, 8, 8)
    assert (samples.hints - 0.2).abs().max() < 1e-6
    before = repr(data), repr(Folder(tmp_path, 8))
    Image.fromarray(randn(8, 8, 3).byte().numpy()).save(tmp_path / "cat.hint.png")  # another of that name
    assert repr(Folder(tmp_path, 8, hints=True)) != before[0] and repr(Folder(tmp_path, 8)) == before[1]


def test_hints_that_do_not_belong_to_their_picture_are_left_out(tmp_path, capsys):
    Image.fromarray(np.full((8, 16, 3), 90, np.uint8)).save(tmp_path / "cat.png")
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "cat.hint.png")
    (tmp_path / "cat.txt").write_text("cat")
    with pytest.raises(ValueError, match="no readable picture with a caption and a hint"):
        Folder(tmp_path, 8, hints=True)
    assert "cat.hint.png has another aspect" in capsys.readouterr().err
    line = json.dumps({"file_name": "cat.png", "text": "cat", "hint_file_name": 7})
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="no readable picture"):
        Folder(tmp_path, 8, hints=True)
    assert "line 1 has no file_name and text, or what is no name for a file" in capsys.readouterr().err


def test_a_large_picture_is_read_in_little_memory(tmp_path, monkeypatch):
    rows, columns = np.mgrid[:800, :1000] / 1000
    large = np.stack([rows, columns, (rows + columns) / 2], -1)
    Image.fromarray((255 * large).astype(np.uint8)).save(tmp_path / "large.png")
    seen, picture = [], images.picture
    monkeypatch.setattr(
        images, "picture", lambda image, name: seen.append(image.size) or picture(image, name)
    )
    x = read_picture(tmp_path / "large.png", 16)
    assert seen == [(32, 32)]
    wanted = (
        torch.from_numpy(large[:, 100:900]).permute(2, 0, 1).unflatten(1, (16, 50)).unflatten(3, (16, 50))
    )
    assert (x / 2 + 0.5 - wanted.mean((2, 4))).abs().max() < 0.01


@pytest.mark.slow
def test_a_run_on_eight_pictures_learns_them(tmp_path):
    data = Folder(write_folder(tmp_path / "pictures"), 16)
    movq = initialize(MoVQ(MoVQConfig((32, 32), 1, num_vq_embeddings=20, norm_num_groups=16)), 0)
    settings = Settings(40, 8, learning_rate=4e-3, warmup=5, ema=0.9, sample_every=40)
    Trainer(MoVQObjective(movq, data, data), settings, tmp_path / "out").run(progress=False)
    lines = (tmp_path / "out" / "training" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line and "psnr" not in line]
    measured = [json.loads(line) for line in lines if "psnr" in line]
    assert losses[-1] < losses[0] / 2 and measured[-1]["psnr"] > 14
    assert (tmp_path / "out" / "training" / "samples" / "0000040.png").exists()


def test_tokenizer_ends_prompts_with_the_largest_id(tmp_path):
    captions = Shapes(0, 8).load(list(range(300))).captions
    size = write_tokenizer(captions, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    assert tokenizer.convert_tokens_to_ids([START, END]) == [size - 2, size - 1]
    for text in [*captions[:20], "Crème brûlée, 42 €"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == size - 2 and ids.index(max(ids)) == len(ids) - 1
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")
    assert len(tokenizer("a red circle above a small blue square")["input_ids"]) == 10


def test_a_tokenizer_that_was_half_written_has_no_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "atomic_file", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_tokenizer(["a red circle"], tmp_path)
    assert not (tmp_path / "vocab.json").exists()


def test_scene_labels_and_recolouring_agree_with_the_scene():
    scenes = Shapes(0, 8).load(range(20)).scenes
    labels = scene_labels(scenes)
    for scene, row in zip(scenes, labels):
        assert int((row[:, 0] > 0).sum()) == len(scene.objects)
        for item in scene.objects:
            shape, color, size = row[shapes.PLACES.index(item.place)].tolist()
            assert list(shapes.SHAPES)[shape - 1] == item.shape and shapes.OBJECT_COLORS[color] == item.color
            assert size == (item.size == "large")
    from random import Random

    pixels = Shapes(0, 16).load([0]).pixels[0]
    before = pixels.clone()
    recolor(pixels, labels[0], Random(1))
    assert not torch.equal(pixels, before) and pixels.abs().max() <= 1 and (labels[0][:, 1] == -1).all()
    assert len(pixels.flatten(1).unique(dim=1)[0]) == len(before.flatten(1).unique(dim=1)[0])


def test_the_decoders_mean_squared_error_ignores_the_variance():
    unet = ours(UNet, reference_unet())
    x0, noise, t, embeds = (
        randn(2, 4, 8, 8),
        randn(2, 4, 8, 8, seed=1),
        torch.tensor([3, 700]),
        randn(2, EMBEDDING_DIM),
    )
    with torch.no_grad():
        error, _ = decoder_loss(unet, DDPMScheduler(), x0, noise, t, embeds)
        level = DDPMScheduler().alphas_cumprod[t].reshape(2, 1, 1, 1)
        eps = unet(level.sqrt() * x0 + (1 - level).sqrt() * noise, t, embeds)[:, :4]
    torch.testing.assert_close(error, F.mse_loss(eps, noise))


@pytest.mark.parametrize("fails", ["draw", "write"])
def test_a_run_that_stops_behind_its_last_save_writes_its_networks_when_started_again(tmp_path, fails):
    objective, file = movq_objective(), tmp_path / "movq" / "diffusion_pytorch_model.safetensors"
    setattr(objective, "sample" if fails == "draw" else "save", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Trainer(objective, Settings(2, 2), tmp_path).run(progress=False)
    assert file.exists() == (fails == "draw") and (tmp_path / "training" / "state.safetensors").exists()
    Trainer(movq_objective(), Settings(2, 2), tmp_path).run(progress=False)
    average = state(tmp_path)
    assert all(torch.equal(x, average[f"average.movq.{name}"]) for name, x in load_file(file).items())
    file.write_bytes(b"of a later stage")
    Trainer(movq_objective(), Settings(2, 2), tmp_path).run(progress=False)
    assert file.read_bytes() == b"of a later stage"


def test_a_network_is_saved_in_another_precision_without_a_second_one_in_memory(tmp_path, monkeypatch):
    movq = movq_objective().movq
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda *_: 1 / 0)
    save_as(movq, tmp_path, torch.float16)
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], x.half()) for name, x in movq.state_dict().items())
    assert movq.dtype == torch.float32 and all(p.requires_grad for p in movq.parameters())


def test_a_cache_is_not_in_memory_twice(tmp_path, monkeypatch):
    batches, alive = [], []

    def encode(samples: Samples) -> dict[str, torch.Tensor]:
        rows = samples.pixels.mean(dim=(2, 3))
        batches.append(weakref.ref(rows))
        return {"image_embeds": rows}

    write = lambda *_: alive.extend(row() is not None for row in batches)  # noqa: E731
    monkeypatch.setattr(embedding_cache, "write_safetensors", write)
    build_cache(Shapes(3, 16), 6, tmp_path / "cache", encode, batch_size=2, progress=False)
    assert len(alive) == 3 and sum(alive) <= 1  # the loop's last


def test_of_a_torn_state_it_is_said_what_to_do(tmp_path):
    path = tmp_path / "training" / "state.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"torn")
    for read in (lambda: Trainer(movq_objective(), Settings(1, 2), tmp_path), lambda: Cache.read(path)):
        with pytest.raises(ValueError, match=r"is not a whole .*\); delete it to begin anew$"):
            read()


def test_what_is_missing_is_not_to_be_deleted(tmp_path):
    with pytest.raises(ValueError, match="no such file: .*gone$"):
        Cache.read(tmp_path / "gone")


def test_a_data_set_without_a_repr_is_told_by_its_type(tmp_path):
    class Own:
        load = staticmethod(Shapes(3, 16).load)

    encode = lambda samples: {"image_embeds": samples.pixels}  # noqa: E731
    for _ in range(2):
        build_cache(Own(), 2, tmp_path / "cache", encode, progress=False)
    with pytest.raises(ValueError, match="made from the same data;"):
        build_cache(Shapes(3, 16), 2, tmp_path / "cache", encode, progress=False)


def test_whole_object_weights_are_the_same_data_set_given_or_not():
    parser = ArgumentParser()
    training_cli.add_training_flags(parser)
    given = [[], ["--object-weights", *map(str, map(int, OBJECT_WEIGHTS))]]
    sets = [training_cli.data_of(parser.parse_args(["--out", "no", *more])) for more in given]
    assert repr(sets[0]) == repr(sets[1])


def test_the_wait_for_the_first_process_ends_with_what_started_both(tmp_path, monkeypatch):
    parents = iter([1, 1, 2])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(embedding_cache.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(embedding_cache.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="was not written, and what started this process has ended"):
        build_cache(Shapes(3, 16), 2, tmp_path / "cache", dict, progress=False)


def test_what_killed_saves_left_is_removed(tmp_path):
    (tmp_path / "training").mkdir()
    left = tmp_path / "training" / ".state.x1y2z3.safetensors"
    left.write_bytes(b"half a state")
    Trainer(movq_objective(), Settings(1, 2), tmp_path).run(progress=False)
    assert not left.exists() and state(tmp_path)
    left = tmp_path / ".cache.x1y2z3.safetensors"
    left.write_bytes(b"half a cache")
    encode = lambda samples: {"image_embeds": samples.pixels}  # noqa: E731
    build_cache(Shapes(3, 16), 2, tmp_path / "cache.safetensors", encode, progress=False)
    assert not left.exists() and Cache.read(tmp_path / "cache.safetensors")


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_no_weight(tmp_path):
    trainer = Trainer(movq_objective(), Settings(1, 2), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    weight = trainer.objective.movq.decoder.conv_out.weight
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=r"the loss is \d.* norm (nan|inf) at step 0; try a lower"):
        trainer.run(progress=False)
    assert all(torch.equal(p, before[name]) for name, p in trainer.weights.items())
