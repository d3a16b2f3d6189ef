"""Holds networks, schedulers and pipelines against diffusers; exit code 1 when one is over what is allowed.

In float32 the two must agree to the distance allowed. In half precision both are held against diffusers in
float32, and ours may lie no farther from it than diffusers in the same half precision, times a factor.
"""

import functools
import gc
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reference import distance, randn, reference_for, share
from torch import Tensor, nn

from kandinsky import Kandinsky, arguments, cli, random_weights, scheduler_files, schedulers
from kandinsky.checkpoint import write_json
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.images import check_writable
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from kandinsky.zero_image import zero_image_embeds

FACTOR = {"small": 1.3, "released": 1.1}  # half precision: ours against theirs
PROMPT = "a red cat, 4k photo"
Outputs = dict[str, Tensor]


@dataclass
class Row:
    """One line of the table. In half precision `relative_l2` is ours from the float32 reference."""

    component: str
    max_abs: float
    relative_l2: float
    allowed: float
    theirs: float | None = None  # diffusers' own distance from its float32

    @property
    def passes(self) -> bool:
        return self.relative_l2 <= self.allowed  # false for NaN


@dataclass
class Case:
    """A network, diffusers' or transformers' class for it, and what both are asked for the same inputs."""

    network: type
    subfolder: str
    inputs: Callable[[Any, int, "Settings"], tuple[Tensor, ...]]
    ours: Callable[..., Outputs]
    theirs: Callable[..., Outputs]


@dataclass
class Settings:
    size: str
    device: torch.device
    dtype: torch.dtype
    pixels: int | None
    seeds: int
    model: str = "2.2"
    decoder: Path | None = None  # else random weights in memory
    prior: Path | None = None


def cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def prior_inputs(config: Any, seed: int, settings: Settings) -> tuple[Tensor, ...]:
    n, d = config.num_embeddings, config.embedding_dim
    mask = torch.arange(n)[None] < torch.tensor([[n], [9]])
    x, text_embeds, text_states = (
        randn(2, d, seed=seed),
        randn(2, d, seed=seed + 1),
        randn(2, n, d, seed=seed + 2),
    )
    return x, torch.tensor([957, 42]), text_embeds, text_states, mask


def our_prior(prior: Prior, x: Tensor, t: Tensor, *text: Tensor) -> Outputs:
    return {"prior": prior(x, t, *text), "prior, prefill and step": prior.step(x, t, prior.prefill(*text))}


def their_prior(prior: Any, *inputs: Tensor) -> Outputs:
    out = prior(*inputs).predicted_image_embedding
    return {"prior": out, "prior, prefill and step": out}


def unet_name(config: Any) -> str:
    return (
        "unet, hint"
        if config.hint
        else "unet"
        if config.in_channels == config.latent_channels
        else "unet, inpaint"
    )


def latent_size(config: Any, settings: Settings) -> int:
    """Latents of the asked pixels; the released f is 8, the small one 4."""
    factor = 8 if len(config.block_out_channels) == 4 else 4
    return config.sample_size if settings.pixels is None else settings.pixels // factor


def unet_inputs(config: Any, seed: int, settings: Settings) -> tuple[Tensor | None, ...]:
    size, channels = latent_size(config, settings), 4 if config.hint else config.in_channels
    hint = randn(1, 3, 8 * size, 8 * size, seed=seed + 2) if config.hint else None
    texts = (None, None)
    if config.text:
        texts = randn(1, config.image_dim, seed=seed + 3), randn(1, 77, config.embedding_dim, seed=seed + 4)
    x, image_embeds = randn(1, channels, size, size, seed=seed), randn(1, config.image_dim, seed=seed + 1)
    return x, torch.tensor([681]), image_embeds, hint, *texts


def our_unet(unet: UNet, x: Tensor, t: Tensor, image_embeds: Tensor, *others: Tensor | None) -> Outputs:
    name, plan = unet_name(unet.config), unet.prepare(image_embeds, t.tolist(), *others)
    return {name: unet(x, t, image_embeds, *others), f"{name}, prepared": unet.step(x, plan, 0)}


def their_unet(
    unet: Any,
    x: Tensor,
    t: Tensor,
    image_embeds: Tensor,
    hint: Tensor | None,
    text_embeds: Tensor | None,
    text_states: Tensor | None,
) -> Outputs:
    added = {"image_embeds": image_embeds, "hint": hint, "text_embeds": text_embeds}
    added = {key: tensor for key, tensor in added.items() if tensor is not None}
    out = unet(x, t, encoder_hidden_states=text_states, added_cond_kwargs=added).sample
    is_inpaint = hint is None and unet.config.in_channels != 4
    name = "unet, hint" if hint is not None else "unet, inpaint" if is_inpaint else "unet"
    return {name: out, f"{name}, prepared": out}


def movq_inputs(config: Any, seed: int, settings: Settings) -> tuple[Tensor, ...]:
    pixels = settings.pixels or (512 if settings.size == "released" else 32)
    size = pixels // config.downscale
    return randn(1, 3, pixels, pixels, seed=seed), randn(1, config.latent_channels, size, size, seed=seed + 1)


def our_movq(movq: MoVQ, pixels: Tensor, latents: Tensor) -> Outputs:
    return {"movq encode": movq.encode(pixels), "movq decode": movq.decode(latents)}


def their_movq(movq: Any, pixels: Tensor, latents: Tensor) -> Outputs:
    decoded = movq.decode(latents, force_not_quantize=True).sample
    return {"movq encode": movq.encode(pixels).latents, "movq decode": decoded}


def text_inputs(config: Any, seed: int, settings: Settings) -> tuple[Tensor, ...]:
    end = config.vocab_size - 1
    ids = torch.randint(0, end, (2, 77), generator=torch.Generator().manual_seed(seed))
    ids[0, 9:], ids[1, 76] = end, end
    return (ids,)


def our_text(tower: CLIPTextEncoder, ids: Tensor) -> Outputs:
    states, embeds = tower(ids)
    return {"text encoder, states": states, "text encoder, embedding": embeds}


def their_text(tower: Any, ids: Tensor) -> Outputs:
    out = tower(ids)
    return {"text encoder, states": out.last_hidden_state, "text encoder, embedding": out.text_embeds}


def multilingual_inputs(config: Any, seed: int, settings: Settings) -> tuple[Tensor, ...]:
    """Whole and short prompts: begin 0, end 2, padding 1"""
    ids = torch.randint(4, config.vocab_size, (2, 77), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[0, 76], ids[1, 8], ids[1, 9:] = 0, 2, 2, 1
    return (ids,)


def our_multilingual(tower: MultilingualCLIP, ids: Tensor) -> Outputs:
    states, embeds = tower(ids)
    return {"multilingual, states": states, "multilingual, embedding": embeds}


def their_multilingual(tower: Any, ids: Tensor) -> Outputs:
    embeds, states = tower(ids, (ids != 1).long())
    return {"multilingual, states": states, "multilingual, embedding": embeds}


def image_inputs(config: Any, seed: int, settings: Settings) -> tuple[Tensor, ...]:
    return (randn(1, 3, config.image_size, config.image_size, seed=seed),)


def our_image(tower: CLIPImageEncoder, pixels: Tensor) -> Outputs:
    return {"image encoder": tower(pixels), "image encoder, zero image": zero_image_embeds(tower)}


def their_image(tower: Any, pixels: Tensor) -> Outputs:
    zero = tower(torch.zeros_like(pixels)).image_embeds
    return {"image encoder": tower(pixels).image_embeds, "image encoder, zero image": zero}


CASES = {
    "prior": Case(Prior, "prior", prior_inputs, our_prior, their_prior),
    "unet": Case(UNet, "unet", unet_inputs, our_unet, their_unet),
    "inpaint": Case(UNet, "unet", unet_inputs, our_unet, their_unet),
    "hint": Case(UNet, "unet", unet_inputs, our_unet, their_unet),
    "movq": Case(MoVQ, "movq", movq_inputs, our_movq, their_movq),
    "text_encoder": Case(CLIPTextEncoder, "text_encoder", text_inputs, our_text, their_text),
    "image_encoder": Case(CLIPImageEncoder, "image_encoder", image_inputs, our_image, their_image),
    "decoder_text_encoder": Case(
        MultilingualCLIP, "text_encoder", multilingual_inputs, our_multilingual, their_multilingual
    ),
}
COMPONENTS = (*CASES, "schedulers", "pipelines")


IN_DECODER = ("unet", "inpaint", "hint", "movq", "decoder_text_encoder")


def load(component: str, settings: Settings) -> nn.Module | None:
    """Our network in float32; None where the given weights have no such network."""
    case = CASES[component]
    repositories, sizes = random_weights.MODELS[settings.model]
    if component == "decoder_text_encoder" and settings.model != "2.1":
        return None
    if settings.decoder is None:
        if component == "hint" and "controlnet-depth" not in repositories:
            return None
        config = getattr(sizes[settings.size], component)
        with torch.device("meta"):
            model = case.network(config)
        return random_weights.randomize(model.to_empty(device="cpu")).to(settings.device)
    folder = settings.decoder if component in IN_DECODER else settings.prior
    if folder is None:
        return None
    if case.network is UNet:
        wanted = {"unet": "unet", "inpaint": "unet, inpaint", "hint": "unet, hint"}[component]
        if unet_name(UNet.read_config(folder / "unet")) != wanted:
            return None
    return case.network.from_pretrained(folder / case.subfolder, device=settings.device)


def allowed_in_float32(name: str) -> float:
    """Decoding is noisier: diffusers' own float32 lies 4e-6 to 1e-5 from its float64 there."""
    return 3e-5 if name == "movq decode" else 1e-5


def check_network(component: str, settings: Settings) -> Iterator[Row]:
    case, model = CASES[component], load(component, settings)
    if model is None:
        return
    reference, is_half = reference_for(model), settings.dtype != torch.float32
    inputs = [
        tuple(
            x if x is None else x.to(settings.device) for x in case.inputs(model.config, 10 * seed, settings)
        )
        for seed in range(settings.seeds if is_half else 1)
    ]
    exact, theirs = [case.theirs(reference, *x) for x in inputs], []
    if is_half:
        share(reference, model.to(settings.dtype))
        reference = reference.to(settings.dtype)
        theirs = [case.theirs(reference, *cast(x, settings.dtype)) for x in inputs]
    ours = [case.ours(model, *x) for x in inputs]
    yield from rows(exact, ours, theirs, settings, allowed_in_float32)


def rows(
    exact: list[Outputs],
    ours: list[Outputs],
    theirs: list[Outputs],
    settings: Settings,
    allowed: Callable[[str], float],
) -> Iterator[Row]:
    """From outputs for every seed; in half precision medians over the seeds."""
    for name in exact[0]:
        pairs = [(o[name].float(), e[name].float()) for o, e in zip(ours, exact)]
        max_abs = max((o - e).abs().max().item() for o, e in pairs)
        if not theirs:
            yield Row(name, max_abs, max(distance(o, e) for o, e in pairs), allowed(name))
            continue
        own = statistics.median(distance(t[name].float(), e) for t, (_, e) in zip(theirs, pairs))
        value = statistics.median(distance(o, e) for o, e in pairs)
        yield Row(name, max_abs, value, FACTOR[settings.size] * own, own)


def check_schedulers(settings: Settings) -> Iterator[Row]:
    """Whole loops on drawn predictions. Schedulers are float32 whatever the networks are: bit for bit."""
    import diffusers

    prior = schedulers.UnCLIPScheduler()
    decoders = [schedulers.DDPMScheduler(), schedulers.DDPMScheduler(clip_sample=False)]
    names = ("DDPM", "DDPM, no clipping", "UnCLIP")
    if settings.model == "2.1":
        decoders = [*random_weights.REPOSITORIES_2_1["decoder"].schedulers.values()]
        names = ("DDIM", "DDPM, learned", "UnCLIP")
    if settings.decoder is not None:  # those that lie there
        folders = [settings.decoder / name for name in ("scheduler", "ddpm_scheduler")]
        decoders = [scheduler_files.load_scheduler(folder) for folder in folders if folder.is_dir()]
        names = (*(type(s).__name__.removesuffix("Scheduler") for s in decoders), "UnCLIP")
    for scheduler, name in zip([*decoders, prior], names, strict=True):
        config = scheduler_files.to_config(scheduler)
        reference = getattr(diffusers, config["_class_name"]).from_config(config)
        reference.set_timesteps(25)
        generator, pairs = torch.Generator().manual_seed(0), scheduler.timesteps(25)
        x, ours, theirs = randn(1, 4, 8, 8, seed=1), [], []
        for (t, t_prev), their_t in zip(pairs, reference.timesteps, strict=True):
            state, learns = generator.get_state(), scheduler.predicts_variance
            out = randn(1, 8 if learns else 4, 8, 8, seed=t)
            extra = {"prev_timestep": t_prev if t_prev >= 0 else None} if name == "UnCLIP" else {}
            stepped = reference.step(out, their_t, x, generator=generator, **extra).prev_sample
            generator.set_state(state)
            noise = torch.randn(x.shape, generator=generator) if scheduler.draws_noise(t, t_prev) else None
            variance = {"variance": out[:, 4:]} if learns else {}
            ours.append(scheduler.step(out[:, :4], x, t, t_prev, noise, **variance)[0])
            theirs.append(stepped)
            x = stepped
        a, b = torch.stack(ours), torch.stack(theirs)
        yield Row(f"{name}, 25 steps", (a - b).abs().max().item(), distance(a, b), 0.0)


class ZeroImage(nn.Module):
    """Stands for the image tower in diffusers' prior pipeline, which asks it for the zero image alone."""

    def __init__(self, embeds: Tensor, image_size: int):
        super().__init__()
        self.embeds = nn.Parameter(embeds, requires_grad=False)
        self.config = type("Config", (), {"image_size": image_size})()

    @property
    def dtype(self) -> torch.dtype:
        return self.embeds.dtype

    @property
    def device(self) -> torch.device:
        return self.embeds.device

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"image_embeds": self.embeds}


def reference_pipeline(pipe: Kandinsky) -> Any:
    """diffusers' combined pipeline at the weights that ours has loaded."""
    import diffusers
    from transformers import CLIPImageProcessor, CLIPTokenizer

    schedulers_ = [scheduler_files.to_config(s) for s in (pipe.scheduler, pipe.prior_scheduler)]
    decoder, prior = (getattr(diffusers, c["_class_name"]).from_config(c) for c in schedulers_)
    image_size = CLIPImageEncoder.read_config(pipe.prior_folder / "image_encoder").image_size
    kind, texts = diffusers.KandinskyV22CombinedPipeline, {}
    if pipe.unet_config.text:
        kind = diffusers.KandinskyCombinedPipeline
        texts["text_encoder"] = reference_for(pipe.decoder_text_encoder)
        texts["tokenizer"] = pipe.decoder_tokenizer.tokenizer
    combined = kind(
        **texts,
        unet=reference_for(pipe.unet),
        scheduler=decoder,
        movq=reference_for(pipe.movq),
        prior_prior=reference_for(pipe.prior),
        prior_image_encoder=ZeroImage(pipe.zero_image_embeds, image_size).to(pipe.dtype),
        prior_text_encoder=reference_for(pipe.text_encoder),
        prior_tokenizer=CLIPTokenizer.from_pretrained(pipe.prior_folder / "tokenizer"),
        prior_scheduler=prior,
        prior_image_processor=CLIPImageProcessor(),
    )
    for part in (combined, combined.prior_pipe, combined.decoder_pipe):
        part.set_progress_bar_config(disable=True)
    return combined


def our_pictures(pipe: Kandinsky, pixels: int, seed: int) -> Outputs:
    size, steps = {"height": pixels, "width": pixels}, {"num_inference_steps": 4}
    embeds = pipe.embed(PROMPT, num_inference_steps=3, seed=seed)
    combined = {"prior_num_inference_steps": 3, "seed": seed, **steps, **size}
    picture = pipe.text2img(PROMPT, **combined, output_type="pt")
    found = {"pipeline, embed": embeds.image_embeds, "pipeline, combined picture": picture}
    if pipe.unet_config.text:  # its decoder reads the prompt too, and diffusers' returns no latents
        alone = pipe.text2img(PROMPT, embeds=embeds, **size, **steps, seed=seed, output_type="pt")
        return found | {"pipeline, text2img picture": alone}
    latents = pipe.text2img(embeds=embeds, **size, **steps, seed=seed, output_type="latent")
    found["pipeline, text2img latents"] = latents
    return found | {"pipeline, combined latents": pipe.text2img(PROMPT, **combined, output_type="latent")}


def their_pictures(reference: Any, pixels: int, seed: int) -> Outputs:
    def settings(output_type: str) -> dict[str, Any]:
        size, generator = {"height": pixels, "width": pixels}, torch.Generator("cpu").manual_seed(seed)
        return {**size, "num_inference_steps": 4, "generator": generator, "output_type": output_type}

    def tensor(picture: Any) -> Tensor:
        return torch.from_numpy(picture).movedim(-1, 1).to(embeds.image_embeds.device)

    generator = torch.Generator("cpu").manual_seed(seed)
    embeds = reference.prior_pipe(PROMPT, num_inference_steps=3, generator=generator)
    both = {"image_embeds": embeds.image_embeds, "negative_image_embeds": embeds.negative_image_embeds}
    combined = {"prompt": PROMPT, "prior_num_inference_steps": 3}
    picture = tensor(reference(**combined, **settings("np")).images)
    found = {"pipeline, embed": embeds.image_embeds, "pipeline, combined picture": picture}
    if hasattr(reference, "text_encoder"):
        alone = reference.decoder_pipe(PROMPT, **both, **settings("np")).images
        return found | {"pipeline, text2img picture": tensor(alone)}
    found["pipeline, text2img latents"] = reference.decoder_pipe(**both, **settings("latent")).images
    return found | {"pipeline, combined latents": reference(**combined, **settings("latent")).images}


def check_pipelines(settings: Settings) -> Iterator[Row]:
    if settings.decoder is None:
        with tempfile.TemporaryDirectory() as folder:
            made = random_weights.make(
                Path(folder), settings.size, say=lambda line: None, model=settings.model
            )
            settings.prior, settings.decoder = made
            try:
                yield from check_pipelines(settings)
            finally:
                settings.decoder = settings.prior = None
        return
    pipe = Kandinsky.from_pretrained(settings.decoder, settings.prior, settings.device)
    if settings.prior is None or unet_name(pipe.unet_config) != "unet":
        return
    default = 256 if settings.size == "released" else 32
    pixels, is_half = settings.pixels or default, settings.dtype != torch.float32
    reference, seeds = reference_pipeline(pipe), range(settings.seeds if is_half else 1)
    exact, theirs = [their_pictures(reference, pixels, seed) for seed in seeds], []
    if is_half:
        pipe.to(dtype=settings.dtype)
        reference = reference_pipeline(pipe)
        theirs = [their_pictures(reference, pixels, seed) for seed in seeds]
    ours = [our_pictures(pipe, pixels, seed) for seed in seeds]
    yield from rows(exact, ours, theirs, settings, lambda name: 1e-5 if "embed" in name else 1e-4)


def check(component: str, settings: Settings) -> Iterator[Row]:
    if component in CASES:
        yield from check_network(component, settings)
    else:
        yield from {"schedulers": check_schedulers, "pipelines": check_pipelines}[component](settings)
    gc.collect()


def quiet_libraries() -> None:
    """Importing them sets their loggers' levels, so it is done first."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()


def line(row: Row) -> str:
    theirs = "" if row.theirs is None else f"{row.theirs:.2e}"
    numbers = f"{row.max_abs:>10.1e}{row.relative_l2:>13.2e}{theirs:>13}{row.allowed:>11.1e}"
    return f"{row.component:28}{numbers}  {'ok' if row.passes else 'OVER'}"


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument(
        "--size", choices=tuple(random_weights.SIZES), default="small", help="of random networks"
    )
    parser.add_argument(
        "--model", choices=tuple(random_weights.MODELS), default="2.2", help="whose random networks"
    )
    parser.add_argument("--weights", help="2.2, 2.1 or a decoder folder, in place of random networks")
    parser.add_argument(
        "--prior", type=Path, metavar="FOLDER", help="default: the one that belongs to --weights"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps …")
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32", help="of the weights")
    parser.add_argument("--only", choices=COMPONENTS, action="append", help="one component; may be repeated")
    parser.add_argument(
        "--pixels", type=int, help="height and width; default: the released 512, pipelines 256, small 32"
    )
    parser.add_argument(
        "--seeds", type=int, default=8, help="of the inputs in half precision, where medians count"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    cli.needs(parser, argv, "prior", "weights")
    if args.weights is not None:
        cli.refuse(parser, argv, ("size", "model"), "random networks, not of --weights")
    if args.json is not None:
        check_writable(args.json, {".json": "JSON"})
    return args


def settings_of(args: Any) -> Settings:
    device, dtype = arguments.device(args.device), getattr(torch, args.dtype)
    pixels = None if args.pixels is None else arguments.whole(args.pixels, "--pixels")
    settings = Settings(args.size, device, dtype, pixels, arguments.whole(args.seeds, "--seeds"), args.model)
    if args.weights is not None:
        decoder = cli.decoder_folder(args.weights)
        pipe = Kandinsky.from_pretrained(decoder, args.prior)
        settings.decoder, settings.prior = pipe.decoder_folder, pipe.prior_folder
        settings.model = "2.1" if pipe.unet_config.text else "2.2"
        settings.size = "released" if pipe.unet_config.block_out_channels[0] == 384 else "small"
    if pixels and pixels % 64:
        raise ValueError(f"--pixels is {pixels}; a multiple of 64 is needed")
    return settings


@cli.one_line_errors
@torch.no_grad()
def main(argv=None) -> int:
    args = parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    settings, say, found, missing = settings_of(args), functools.partial(print, flush=True), [], []
    where = args.weights or f"random weights of {settings.model}, {settings.size} sizes"
    say(f"{where}; {args.dtype} on {settings.device}; torch {torch.__version__}")
    say(f"{'component':28}{'max abs':>10}{'relative L2':>13}{'diffusers':>13}{'allowed':>11}")
    for component in args.only or COMPONENTS:
        before = len(found)
        for row in check(component, settings):
            found.append(row)
            say(line(row))
        if args.only and len(found) == before:
            missing.append(component)
    nothing = f"nothing of {' or '.join(missing)} in {where}"
    if not found:
        raise ValueError(nothing)
    if missing:
        print(nothing, file=sys.stderr)
    if args.json is not None:
        table = [asdict(row) | {"ok": row.passes} for row in found]
        write_json(
            {"size": settings.size, "dtype": args.dtype, "device": args.device, "rows": table}, args.json
        )
    over = sum(not row.passes for row in found)
    say(f"{len(found) - over} of {len(found)} within what is allowed")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
