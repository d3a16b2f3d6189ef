"""One HTML page that tells a run, whole in itself: no script, no network, no further file."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from kandinsky.explain import Trace

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: auto; padding: 1rem }
img { image-rendering: pixelated; max-width: 100% }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .25rem }
figure { margin: 0; text-align: center; flex: none }
figcaption { font-size: .8rem }
.token { border: 1px solid; border-radius: .3rem; padding: .1rem .4rem; margin: .1rem; display: inline-block }
table { border-collapse: collapse; font-size: .8rem }
td, th { padding: .1rem .5rem; text-align: right }
th:first-child { text-align: left; font-weight: normal }
.wide { overflow-x: auto }
svg { max-width: 100%; height: auto }
.bars { text-align: left }
.bar { background: #4477aa; height: .8rem; display: inline-block; vertical-align: middle }
.warning { border-left: .3rem solid #cc6677; padding-left: .5rem }
"""


def page(run: Trace) -> str:
    """The document, to be written as UTF-8."""
    title = f"Kandinsky: {run.settings['prompt'] or run.task}"
    reads = "2.2's decoder sees no words: these tokens are the image embedding's."
    if run.reads_words:
        reads = "2.1's decoder reads words too: these tokens are the image embedding's and then the prompt's."
    sections = [
        ("The picture", picture(run.picture, run.settings["prompt"] or run.task, 256)),
        ("Tokens", tokens(run)),
        (
            "The prior: from noise to an image embedding",
            "<p>Cosine of each step's clean estimate to the embedding that came out.</p>"
            + curve(run.prior_cosines, run.prior_timesteps, "cosine to the result")
            + "<p>The same estimates, projected onto the two directions in which they differ most.</p>"
            + path(run.prior_path)
            + "<p>What the read-out looks at in the first step, when all else is noise (all heads).</p>"
            + bars(run.prior_attention),
        ),
        (
            "The decoder: from noise to latents",
            "<p>The clean estimate of chosen steps, decoded by MoVQ.</p>"
            + film(run)
            + "<p>Share of the middle block's attention on the tokens beside the picture's own positions, "
            f"by step. {reads}</p>"
            + curve(run.image_share, run.decoder_timesteps, "share")
            + "<p>The same in the last step, by position.</p>"
            + heat(run.image_map, "share by position"),
        ),
        ("Norms", "<p>Root mean square of each block's output, by step.</p>" + norms(run)),
        ("Time and memory", parts(run)),
        ("Settings", table([(name, str(value)) for name, value in run.settings.items()])),
    ]
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{text}</section>" for name, text in sections)
    notes = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in run.warnings)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += '<link rel="icon" href="data:,">'  # else a browser asks for one
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = f"<h1>{html.escape(title)}</h1>{notes}{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def picture(image: Image.Image, alt: str, width: int) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img width="{width}" alt="{html.escape(alt)}" src="data:image/png;base64,{text}">'


def tokens(run: Trace) -> str:
    found = (f'<span class="token">{html.escape(token)}</span>' for token in run.tokens)
    return f"<p>{len(run.tokens)} tokens of at most 77:</p><p>{''.join(found)}</p>"


def film(run: Trace) -> str:
    frames = []
    for frame in run.frames:
        alt = f"clean estimate of step {frame.index + 1}"
        caption = f"step {frame.index + 1}, t = {frame.t}"
        shown = picture(frame.picture, alt, 128)
        frames.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="row" tabindex="0" role="group" aria-label="film strip">{"".join(frames)}</div>'


def curve(values: Sequence[float], timesteps: Sequence[int], name: str) -> str:
    """Values over steps; each point says its own when pointed at."""
    if not values:
        return "<p>Not recorded.</p>"
    low, high = min(values), max(values)
    span = high - low or 1.0
    places = [
        (30 + 540 * i / max(1, len(values) - 1), 120 - 100 * (v - low) / span) for i, v in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#4477aa">'
        f"<title>step {i + 1}, t = {t}: {v:.4f}</title></circle>"
        for i, ((x, y), v, t) in enumerate(zip(places, values, timesteps, strict=True))
    )
    label = f"{name}: {values[0]:.3f} at first, {values[-1]:.3f} at last"
    drawn = f'<polyline points="{line}" fill="none" stroke="#4477aa" stroke-width="2"/>{points}'
    return svg(600, 140, drawn, label) + f"<p>{html.escape(label)}</p>"


def path(points: Sequence[Sequence[float]]) -> str:
    if len(points) < 2:
        return "<p>One step makes no path.</p>"
    spans = [(min(p[k] for p in points), max(p[k] for p in points)) for k in (0, 1)]
    scaled = [
        [20 + 260 * (p[k] - low) / (high - low or 1.0) for k, (low, high) in enumerate(spans)] for p in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in scaled)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if i == len(scaled) - 1 else 4}" fill="#4477aa">'
        f"<title>step {i + 1}</title></circle>"
        for i, (x, y) in enumerate(scaled)
    )
    drawn = f'<polyline points="{line}" fill="none" stroke="#999" stroke-width="1"/>{marks}'
    return svg(300, 300, drawn, "path of the clean estimates; the large point is the last")


def svg(width: int, height: int, drawn: str, label: str) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg {size} role="img" aria-label="{html.escape(label)}">{drawn}</svg>'


def bars(shares: Sequence[tuple[str, float]]) -> str:
    most = max((share for _, share in shares), default=1.0)
    rows = [
        f"<tr><th>{html.escape(name)}</th><td>{share:.3f}</td>"
        f'<td class="bars"><span class="bar" style="width:{100 * share / most:.0f}px"></span></td></tr>'
        for name, share in shares
    ]
    return f'<div class="wide" tabindex="0"><table>{"".join(rows)}</table></div>'


def heat(rows: Sequence[Sequence[float]], name: str) -> str:
    values = [value for row in rows for value in row]
    if not values:
        return "<p>Not recorded.</p>"
    low, span = min(values), max(values) - min(values) or 1.0
    cells = "".join(
        f'<rect x="{24 * x}" y="{24 * y}" width="24" height="24" fill="#4477aa" '
        f'fill-opacity="{(value - low) / span:.3f}">'
        f"<title>row {y + 1}, column {x + 1}: {value:.4f}</title></rect>"
        for y, row in enumerate(rows)
        for x, value in enumerate(row)
    )
    label = f"{name}, from {low:.3f} (clear) to {max(values):.3f} (full)"
    return svg(24 * max(map(len, rows)), 24 * len(rows), cells, label) + f"<p>{label}</p>"


def norms(run: Trace) -> str:
    """A column for the first, the middle and the last step."""
    steps = len(run.decoder_timesteps)
    if not steps:
        return "<p>No step ran: the picture was only encoded and decoded.</p>"
    columns = sorted({0, steps // 2, steps - 1})
    heads = "".join(f"<th>t = {run.decoder_timesteps[i]}</th>" for i in columns)
    rows = [
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{values[i]:.3f}</td>' for i in columns)}</tr>"
        for name, values in run.norms.items()
    ]
    return (
        f'<div class="wide" tabindex="0"><table><tr><th>block</th>{heads}</tr>{"".join(rows)}</table></div>'
    )


def parts(run: Trace) -> str:
    rows = [(name, f"{seconds:.2f} s", f"{peak:.0f} MiB at most so far") for name, seconds, peak in run.parts]
    return "<p>Reading the weights and recording all this are included.</p>" + table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{html.escape(first)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
