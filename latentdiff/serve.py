"""`latentdiff serve`: a page in the browser to draw, edit and inpaint on."""

import ipaddress
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from PIL import Image

from .config import ConfigError

if TYPE_CHECKING:
    import gradio

    from .studio import Studio

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Open a page to draw on: text to image, image to image, inpainting, interpolation."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, or a model on the Hub as owner/name."""
    inpaint_checkpoint: str | None = None
    """One whose UNet was trained to inpaint; by default the checkpoint's own blends the parts."""
    lora: Path | None = None
    """Folder of LoRA weights to draw with; distilled ones draw in few steps."""
    host: str = LOOPBACK
    """Address to listen on. The page asks for no password: any but 127.0.0.1 opens it to whoever can reach that."""
    port: int | None = None
    """By default the first free one from 7860."""
    max_queue: int = 8
    """Drawings that may wait; one at a time is drawn."""
    max_upload_mb: int = 10
    """The largest file that may be uploaded."""
    device: str | None = None
    """As torch names it; by default cuda where there is one, else cpu."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks; fp16 and bf16 are for GPUs."""

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_upload_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must lie in 1 … 65535")


def serve(options: Serve) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: Gradio is not installed, a checkpoint cannot be loaded, or the address cannot be listened on.
    """
    require_gradio()
    from .studio import MAX_PIXELS

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Gradio opens some pictures before we do; Pillow then refuses twice as many
    studio = open_studio(options)
    with tempfile.TemporaryDirectory(prefix="latentdiff-") as folder:
        page = launch(studio, options, Path(folder))
        announce(page.local_url, options.host)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("closed")
        finally:
            studio.close()
            page.close(verbose=False)


def announce(url: str, host: str) -> None:
    """Say where the page is, and who can use it if not only this machine."""
    if not is_loopback(host):
        print(f"warning: whoever can reach {host} can use this page, without a password", file=sys.stderr)
    print(f"{url} (Ctrl-C ends it)", flush=True)


def require_gradio() -> None:
    """Raise a ConfigError that says how to install Gradio where it is missing."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError("the page needs Gradio: pip install 'latentdiff[serve]'") from None


def open_studio(options: Serve) -> "Studio":
    """The checkpoints, loaded."""
    from .loading import load_networks
    from .studio import Studio

    networks = load_networks(options.checkpoint, options.device, options.dtype, lora=options.lora)
    if options.inpaint_checkpoint is None:
        return Studio(networks)
    return Studio(networks, load_networks(options.inpaint_checkpoint, options.device, options.dtype))


def launch(studio: "Studio", options: Serve, folder: Path) -> "gradio.Blocks":
    """The page, answering on its address; pictures are kept in `folder`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    from .page import CSS, THEME, Page

    page = Page(studio, folder, Path(options.checkpoint).name, options.max_queue).blocks
    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            max_file_size=f"{options.max_upload_mb}mb",
            theme=THEME,
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            footer_links=[],
            share=False,
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
    except OSError as error:
        where = options.host if options.port is None else f"{options.host}:{options.port}"
        raise ConfigError(f"{where} cannot be listened on: {str(error).splitlines()[0]}") from None
    return page


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
