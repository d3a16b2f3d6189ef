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
.wide svg { max-width: none }
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
            + "<p>What the read-out looks at, mean of heads and blocks: a row a token, a column a step.</p>"
            + token_map(run.prior_attention, run.prior_timesteps),
        ),
        (
            "The decoder: from noise to latents",
            "<p>The clean estimate of chosen steps, decoded by MoVQ.</p>"
            + film(run)
            + "<p>Share of the middle block's attention on the tokens beside the picture's own positions, "
            f"by step. {reads}</p>"
            + curve(run.image_share, run.decoder_timesteps, "share")
            + "<p>The same by position, in the steps of the film strip.</p>"
            + strip([(f"step {f.index + 1}", rows) for f, rows in zip(run.frames, run.image_maps)])
            + words(run),
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
    whole = "The text tower also makes one embedding of the whole prompt; its cosine to the image embedding"
    whole += f" that the prior made is {run.text_cosine:.3f}."
    return f"<p>{len(run.tokens)} tokens of at most 77:</p><p>{''.join(found)}</p><p>{whole}</p>"


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


def token_map(shares: Sequence[tuple[str, Sequence[float]]], timesteps: Sequence[int]) -> str:
    """A row for each token, a square for each step; each says its share when pointed at."""
    side, left, cells = 14, 160, []
    most = max((max(values) for _, values in shares), default=1.0)
    for y, (name, values) in enumerate(shares):
        top = side * y
        cells.append(f'<text x="{left - 6}" y="{top + 11}" text-anchor="end">{html.escape(name)}</text>')
        for x, (share, t) in enumerate(zip(values, timesteps, strict=True)):
            said = f"{name}, step {x + 1}, t = {t}: {share:.4f}"
            cells.append(square(left + side * x, top, side, share / most, said))
    first = max(shares, key=lambda share: share[1][0], default=("", [0.0]))
    last = max(shares, key=lambda share: share[1][-1], default=("", [0.0]))
    label = f"most of it on {first[0]} at first ({first[1][0]:.3f}), on {last[0]} at last ({last[1][-1]:.3f})"
    drawn = f'<g font-size="11" fill="currentColor">{"".join(cells)}</g>'
    found = svg(left + side * len(timesteps), side * len(shares), drawn, label)
    return f'<div class="wide" tabindex="0">{found}</div><p>{html.escape(label)}</p>'


def words(run: Trace) -> str:
    """2.1: where the picture reads each word."""
    if not run.word_maps:
        return ""
    return "<p>Where the last step reads each token of the prompt.</p>" + strip(run.word_maps)


def strip(maps: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> str:
    """Maps side by side, shaded alike; each square says its value when pointed at."""
    values = [value for _, rows in maps for row in rows for value in row]
    if not values:
        return "<p>Not recorded.</p>"
    low, span = min(values), max(values) - min(values) or 1.0
    figures = []
    for name, rows in maps:
        side = max(3, 96 // max(map(len, rows)))
        cells = [
            square(
                side * x, side * y, side, (value - low) / span, f"row {y + 1}, column {x + 1}: {value:.4f}"
            )
            for y, row in enumerate(rows)
            for x, value in enumerate(row)
        ]
        drawn = svg(
            side * max(map(len, rows)), side * len(rows), "".join(cells), f"share by position, {name}"
        )
        figures.append(f"<figure>{drawn}<figcaption>{html.escape(name)}</figcaption></figure>")
    row = f'<div class="row" tabindex="0" role="group" aria-label="maps">{"".join(figures)}</div>'
    return f"{row}<p>From {low:.3f} (clear) to {max(values):.3f} (full).</p>"


def square(x: int, y: int, side: int, opacity: float, said: str) -> str:
    place = f'x="{x}" y="{y}" width="{side}" height="{side}"'
    return (
        f'<rect {place} fill="#4477aa" fill-opacity="{opacity:.3f}"><title>{html.escape(said)}</title></rect>'
    )


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
