"""`latentdiff serve`: a page in the browser to draw, edit and inpaint on."""

import ipaddress
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..config.commands import Serve
from ..utils.errors import ConfigError, first_line

if TYPE_CHECKING:
    import gradio

    from .session import Studio


def serve(options: Serve) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: Gradio is not installed, a checkpoint cannot be loaded, or the address cannot be listened on.
    """
    require_gradio()
    from .session import MAX_PIXELS

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
    from .session import Studio

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
        raise ConfigError(f"{where} cannot be listened on: {first_line(error)}") from None
    return page


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
