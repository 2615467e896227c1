"""The page of `latentdiff serve`, laid out with Gradio: what a browser shows of a `Studio`."""

import contextlib
import functools
import html
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from ..config.sampling import SCHEDULERS
from ..utils.errors import ConfigError, first_line
from ..utils.films import save_animation, strip
from ..utils.images import upright_rgb
from .recipe import Recipe, read_recipe, save_png
from .session import (
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    Drawing,
    Preview,
    Progress,
    Settings,
    Stopped,
    Studio,
    open_picture,
)

BRUSH = ("#6366f1", 0.7)
CANVAS = 512  # pixels on which a mask is painted, whatever the picture's size
KEPT = 100  # pictures in a session's gallery
SESSIONS = 500  # of which something is remembered
# System fonts: the page loads nothing from anywhere else.
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    radius_size="md",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto !important}
#picture img, #source img {width: 100%; height: 100%; object-fit: contain}
#gallery .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr))}
"""


class Page:
    """The page's parts, and what happens when somebody uses them.

    Args:
        folder: where drawn pictures are kept as files while the page is open.
        queue_size: how many drawings may wait; who comes later is told to come back.
    """

    def __init__(self, studio: Studio, folder: Path, title: str, queue_size: int):
        self.studio, self.folder = studio, folder
        self.stops: dict[tuple[str | None, str], threading.Event] = {}  # by browser session, and what is drawn
        with gr.Blocks(title="latentdiff", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.drawn = gr.State([], delete_callback=_delete)  # paths, the newest first
            self.shown = gr.State(None)  # the path of the picture above the recipe
            gr.Markdown(f"## latentdiff · {title}")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5):
                    self._lay_out_inputs()
                with gr.Column(scale=5):
                    self._lay_out_outputs()
            self._connect()
        # Closed to calls that go past the queue.
        self.blocks.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)

    def _lay_out_inputs(self) -> None:
        usual = self.studio.usual_settings()
        self.prompt = gr.Textbox(label="Prompt", placeholder="a red apple", lines=2, max_length=MAX_PROMPT)
        self.live = gr.Checkbox(usual.draws_in_few_steps, label="Draw while typing", min_width=120)
        self.negative_prompt = gr.Textbox(
            label="Negative prompt", placeholder="what to lead away from", lines=1, max_length=MAX_PROMPT
        )
        with gr.Tabs(overflow_behavior="wrap") as self.tabs:
            with gr.Tab("Text to image", id="text"):
                self.draw_text = gr.Button("Draw", variant="primary")
            with gr.Tab("Image to image", id="image"):
                self.source = gr.Image(
                    label="Picture to start from", type="filepath", image_mode=None, sources=["upload", "clipboard"],
                    height=300, buttons=[], elem_id="source",
                )  # fmt: skip
                self.strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info="how much of it is given up")
                self.draw_image = gr.Button("Draw from this picture", variant="primary")
            with gr.Tab("Inpaint", id="paint"):
                self.canvas = gr.ImageMask(
                    label="Paint the part to redraw", type="pil", sources=["upload", "clipboard"],
                    canvas_size=(CANVAS, CANVAS), fixed_canvas=True, transforms=(), layers=False, height=420,
                    brush=gr.Brush(default_size=60, colors=[BRUSH], color_mode="fixed"), buttons=[], elem_id="canvas",
                )  # fmt: skip
                self.paint_strength = gr.Slider(0.05, 1, 1, step=0.05, label="Strength", info="how much is given up")
                self.draw_paint = gr.Button("Draw where it is painted", variant="primary")
            with gr.Tab("Interpolate", id="film"):
                self.second_prompt = gr.Textbox(label="Prompt at the end", placeholder="a pear", max_length=MAX_PROMPT)
                with gr.Row(equal_height=True):
                    self.frames = gr.Slider(3, MAX_FRAMES, 16, step=1, label="Frames", scale=2, min_width=240)
                    with gr.Column(min_width=120):
                        self.new_noise = gr.Checkbox(False, label="Other noise at the end")
                        self.loop = gr.Checkbox(True, label="And back again")
                self.draw_film = gr.Button("Draw the film", variant="primary")
        with gr.Row():
            self.steps = gr.Number(usual.steps, label="Steps", precision=0, minimum=1, maximum=MAX_STEPS, min_width=90)
            self.scheduler = gr.Dropdown(
                [(names.title, name) for name, names in SCHEDULERS.items()],
                value=usual.scheduler,
                label="Scheduler",
                min_width=150,
            )
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
        with gr.Row(equal_height=True):
            self.guidance = gr.Slider(
                0, MAX_GUIDANCE, usual.guidance_scale, step=0.5, label="Guidance scale", scale=2, min_width=240
            )
            # What was seen while typing is what the button draws.
            self.random_seed = gr.Checkbox(not usual.draws_in_few_steps, label="New seed each time", min_width=120)

    def _lay_out_outputs(self) -> None:
        self.picture = gr.Image(
            label="Picture", interactive=False, height=400, buttons=["download", "fullscreen"], elem_id="picture"
        )
        with gr.Row(equal_height=True):
            self.status = gr.HTML("", elem_id="status")
            self.stop = gr.Button("Stop", size="sm", interactive=False, scale=0, min_width=90)
        with gr.Row():
            self.edit = gr.Button("Start from this picture", size="sm", interactive=False)
            self.paint = gr.Button("Paint on this picture", size="sm", interactive=False)
        self.gallery = gr.Gallery(
            label="Drawn in this session", columns=8, height=120, object_fit="contain", allow_preview=False,
            interactive=False, buttons=[], elem_id="gallery",
        )  # fmt: skip
        self.recipe = gr.JSON(label="Recipe, which the PNG carries too", max_height=270, elem_id="recipe")
        self.files = gr.Files(label="Files that go with it", visible=False, interactive=False, elem_id="files")

    def _connect(self) -> None:
        settings = [self.prompt, self.negative_prompt, self.seed, self.random_seed]
        settings += [self.steps, self.guidance, self.scheduler]
        outputs = [self.picture, self.status, self.recipe, self.files, self.gallery, self.drawn, self.shown, self.seed]
        buttons = [self.draw_text, self.draw_image, self.draw_paint, self.draw_film, self.stop, self.edit, self.paint]
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow = {"concurrency_limit": 1, "concurrency_id": "draw", "show_progress": "hidden"}
        for button, draw, inputs in (
            (self.draw_text, self.studio.text_to_image, []),
            (self.draw_image, self._image_to_image, [self.source, self.strength]),
            (self.draw_paint, self._inpaint, [self.canvas, self.paint_strength]),
            (self.draw_film, self.studio.interpolate, [self.second_prompt, self.frames, self.new_noise, self.loop]),
        ):
            begun = button.click(self._begin, None, [*buttons, self.status], **quick)
            drawn = begun.then(
                self._handler(draw), [self.drawn, *settings, *inputs], outputs, api_visibility="private", **slow
            )
            drawn.success(self._end, self.shown, buttons, **quick)
            drawn.failure(self._fail, self.shown, [*buttons, self.status], **quick)
        # Of what is typed while a picture is drawn only the newest is drawn next.
        self.prompt.input(
            self._while_typing,
            [self.live, *settings],
            [self.picture, self.status, self.recipe, self.files, self.shown, self.edit, self.paint],
            trigger_mode="always_last",
            api_visibility="private",
            **slow,
        )
        self.stop.click(self._stop, None, self.status, **quick)
        choice = [self.picture, self.recipe, self.files, self.shown, self.status, self.edit, self.paint]
        self.gallery.select(self._show, self.drawn, choice, **quick)
        self.edit.click(lambda path: (path, gr.Tabs(selected="image")), self.shown, [self.source, self.tabs], **quick)
        self.paint.click(lambda path: (path, gr.Tabs(selected="paint")), self.shown, [self.canvas, self.tabs], **quick)
        # Queued, as only such events show their errors; but not behind the drawings.
        checked = self.source.upload(
            self._check_upload,
            self.source,
            None,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        checked.failure(lambda: None, None, self.source, **quick)
        self.blocks.unload(self._leave)

    # Drawing

    def _handler(self, draw: Callable[..., Progress]) -> Callable[..., Iterator[dict]]:
        """An event handler that shows what `draw(settings, stop, *inputs)` yields."""

        def handler(
            request: gr.Request, drawn, prompt, negative_prompt, seed, random_seed, steps, guidance, scheduler, *inputs
        ):
            stop = self._stop_of(request)
            with plain_errors():
                settings = Settings(
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    seed=None if random_seed else seed,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    scheduler=scheduler,
                )
                for event in draw(settings, stop, *inputs):
                    yield self._update(event, drawn)

        return handler

    def _while_typing(
        self, request: gr.Request, live, prompt, negative_prompt, seed, random_seed, steps, guidance, scheduler
    ) -> Iterator[dict]:
        """The picture of a prompt that is not finished, always from the same noise; it is not kept."""
        if not (live and prompt.strip()):
            return
        stop = self._stop_of(request, "typed", anew=True)
        with plain_errors():
            settings = Settings(
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                scheduler=scheduler,
            )
            for drawing in self.studio.text_to_image(settings, stop, previews=False):
                if isinstance(drawing, Drawing):  # and not stopped, because the page closes
                    yield {
                        self.picture: drawing.images[0],
                        self.status: html.escape(" ".join(["Drawn while typing.", *drawing.notes])),
                        self.recipe: json.loads(drawing.recipe.to_json()),
                        self.files: gr.Files(visible=False),
                        self.shown: None,
                        self.edit: gr.Button(interactive=False),
                        self.paint: gr.Button(interactive=False),
                    }

    def _image_to_image(self, settings: Settings, stop: threading.Event, path: str | None, strength: float) -> Progress:
        if path is None:
            raise ValueError("there is no picture to start from: upload one, or draw one and press its button")
        return self.studio.image_to_image(settings, stop, Path(path), strength)

    def _inpaint(self, settings: Settings, stop: threading.Event, painted: dict | None, strength: float) -> Progress:
        if not painted or painted["background"] is None:
            raise ValueError("there is no picture to paint on: upload one, or draw one and press its button")
        picture = upright_rgb(painted["background"])
        strokes = [layer.getchannel("A") for layer in painted["layers"]]
        mask = functools.reduce(ImageChops.lighter, strokes, Image.new("L", picture.size))
        paths = self._new_path("picture"), self._new_path("mask")
        picture.save(paths[0])
        mask.point(lambda alpha: 255 if alpha else 0).save(paths[1])
        return self.studio.inpaint(settings, stop, *paths, strength)

    def _new_path(self, name: str, suffix: str = ".png") -> Path:
        return self.folder / f"{name}-{uuid.uuid4().hex[:12]}{suffix}"

    def _update(self, event: Preview | Drawing | Stopped, drawn: list[str]) -> dict[gr.blocks.Block, Any]:
        """What changes on the page."""
        if isinstance(event, Preview):
            return {self.picture: event.image, self.status: f"Step {event.step} of {event.steps}"}
        if isinstance(event, Stopped):
            return {
                self.status: f"Stopped after step {event.step} of {event.steps}",
                self.recipe: None,
                self.files: gr.Files(visible=False),
                self.shown: None,
            }
        path = self._save(event)
        _delete(drawn[KEPT - 1 :])
        drawn = [path, *drawn[: KEPT - 1]]
        return {
            self.picture: path,
            self.status: html.escape(" ".join(["Drawn.", *event.notes])),
            self.recipe: json.loads(event.recipe.to_json()),
            self.files: self._files_of(path, event.recipe),
            self.gallery: drawn,
            self.drawn: drawn,
            self.shown: path,
            self.seed: event.recipe.seed,
        }

    def _save(self, drawing: Drawing) -> str:
        """The file of a picture; or of a film, beside which its strip of frames then lies and carries the recipe."""
        recipe = drawing.recipe
        if recipe.kind != "interpolate":
            path = self._new_path("drawn")
            save_png(drawing.images[0], path, recipe)
            return str(path)
        path = self._new_path("film", ".gif")
        save_animation(drawing.images, path)
        save_png(strip(drawing.images, recipe.columns), path.with_suffix(".png"), recipe)
        return str(path)

    def _files_of(self, path: str, recipe: Recipe) -> gr.Files:
        """What a picture was drawn from, as far as it was made on this page; of a film, its strip of frames."""
        names = [part.name for part in (recipe.image, recipe.mask) if part is not None]
        if recipe.kind == "interpolate":
            names.append(Path(path).with_suffix(".png").name)
        files = [str(self.folder / name) for name in names if (self.folder / name).is_file()]
        return gr.Files(files or None, visible=bool(files))

    def _begin(self, request: gr.Request) -> list:
        self._stop_of(request, anew=True)
        draw, stop, use = (gr.Button(interactive=on) for on in (False, True, False))
        return [draw, draw, draw, draw, stop, use, use, "Waiting for its turn …"]

    def _end(self, shown: str | None) -> list:
        draw, stop, use = (gr.Button(interactive=on) for on in (True, False, shown is not None))
        return [draw, draw, draw, draw, stop, use, use]

    def _fail(self, shown: str | None) -> list:
        return [*self._end(shown), "Not drawn."]

    def _stop(self, request: gr.Request) -> str:
        self._stop_of(request).set()
        return "Stopping …"

    def _stop_of(self, request: gr.Request, what: str = "asked for", anew: bool = False) -> threading.Event:
        """What ends a session's drawing once it is set."""
        key = (request.session_hash, what)
        if anew or key not in self.stops:
            self.stops.pop(key, None)
            self.stops[key] = threading.Event()
            while len(self.stops) > SESSIONS:
                self.stops.pop(next(iter(self.stops)))
        return self.stops[key]

    def _leave(self, request: gr.Request) -> None:
        self.leave(request.session_hash)

    def leave(self, session: str | None) -> None:
        """The browser's tab was closed: nothing more is drawn for it."""
        for key in [key for key in list(self.stops) if key[0] == session]:
            stop = self.stops.pop(key, None)
            if stop is not None:
                stop.set()

    # What was drawn, and what was uploaded

    def _show(self, chosen: gr.SelectData, drawn: list[str]) -> tuple:
        path, use = drawn[chosen.index], gr.Button(interactive=True)
        recipe = read_recipe(Path(path).with_suffix(".png"))
        return path, json.loads(recipe.to_json()), self._files_of(path, recipe), path, "", use, use

    def _check_upload(self, path: str) -> None:
        with plain_errors():
            open_picture(path)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """An error inside the block is shown on the page as one line; one of ours is printed too."""
    try:
        yield
    except (ValueError, ConfigError) as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
    except Exception as error:
        raise gr.Error(html.escape(f"{type(error).__name__}: {first_line(error)}", quote=False)) from error


def _delete(paths: list[str]) -> None:
    for path in map(Path, paths):
        path.unlink(missing_ok=True)
        path.with_suffix(".png").unlink(missing_ok=True)  # of a film
