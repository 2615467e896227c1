"""`latentdiff serve`: a page in the browser to draw, edit and inpaint on."""

import ipaddress
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..config.commands import Serve
from ..utils.errors import ConfigError, first_line
from ..utils.images import FORMATS

if TYPE_CHECKING:
    import gradio

    from .session import Studio


def serve(options: Serve) -> None:
    """Serve the page until Ctrl-C, SIGTERM or the end of the terminal; no file is left behind.

    Raises:
        ConfigError: Gradio is not installed, a checkpoint cannot be loaded, or the address cannot be listened on.
    """
    require_gradio()
    from .session import MAX_PIXELS

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Gradio opens some pictures before we do; Pillow then refuses twice as many
    Image.ID[:] = [kind for kind in Image.ID if kind in FORMATS]  # nor does Pillow open other kinds for it
    studio = open_studio(options)
    ended = when_ended()
    with tempfile.TemporaryDirectory(prefix="latentdiff-", ignore_cleanup_errors=True) as folder:  # for its owner alone
        page = launch(studio, options, Path(folder))
        announce(page.local_url, options.host)
        try:
            ended.wait()
            print("closed", flush=True)
        finally:
            page.close(verbose=False)
            studio.close()


def when_ended() -> threading.Event:
    """What is set when the process is told to end, by a signal that it was not started to ignore."""
    ended = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: ended.set())
    return ended


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

    how = {"device": options.device, "dtype": options.dtype, "single_file_config": options.single_file_config}
    networks = load_networks(options.checkpoint, lora=options.lora, **how)
    if options.inpaint_checkpoint is None:
        return Studio(networks)
    return Studio(networks, load_networks(options.inpaint_checkpoint, **how))


def launch(studio: "Studio", options: Serve, folder: Path) -> "gradio.Blocks":
    """The page, answering on its address; whatever it keeps as a file is in `folder`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    uploaded, drawn = folder / "uploaded", folder / "drawn"
    for part in (uploaded, drawn):
        part.mkdir(mode=0o700, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(uploaded)  # read when the page is made, and later
    from .guard import GuardedApp, Hosts
    from .page import CSS, SESSIONS, THEME, Page
    from .uploads import Uploads

    page = Page(studio, drawn, Path(options.checkpoint).name, options.max_queue)
    uploads = Uploads(uploaded, options.max_upload_mb * 2**20)
    app = GuardedApp(page, Hosts(options.host, options.allowed_hosts), uploads, options.max_queue)
    try:
        page.blocks.launch(
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
            num_workers=0,  # which would listen elsewhere, without the guard
            state_session_capacity=SESSIONS,
            _app=app,
        )
    except OSError as error:
        where = options.host if options.port is None else f"{options.host}:{options.port}"
        raise ConfigError(f"{where} cannot be listened on: {first_line(error)}") from None
    return page.blocks


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
