"""`python -m runtime`: read the settings, answer probes at once, load in the background, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from runtime import __version__
from runtime.cgroup import cpu_count
from runtime.engine.client import EngineClient
from runtime.errors import StartupError
from runtime.logs import configure, log
from runtime.settings import Settings, load

if TYPE_CHECKING:
    from runtime.model import DiffusionModel


def main() -> int:
    """The process's exit status: 0 after a clean stop, 1 when the start cannot succeed."""
    # Before kserve's slow import, and needed as PID 1: the kernel gives that one no default handlers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    try:
        settings = load()
        configure(settings.log_level, settings.log_format)
        return serve(settings)
    except StartupError as error:
        for line in str(error).splitlines():
            print(f"diffusion-runtime: {line}", file=sys.stderr, flush=True)
        return 1


def serve(settings: Settings) -> int:
    """Serve until a signal. Raises StartupError."""
    if settings.enable_grpc and settings.http_port == settings.grpc_port:
        raise StartupError(f"HTTP_PORT and GRPC_PORT are both {settings.http_port}; they must differ")
    for name, port in (("HTTP_PORT", settings.http_port), ("GRPC_PORT", settings.grpc_port)):
        if name == "HTTP_PORT" or settings.enable_grpc:
            _check_port(name, port)
    engine = EngineClient(settings, settings.cpu_threads or max(1, cpu_count() - 1))
    try:
        engine.spawn()  # it imports torch while this process imports kserve
    except OSError as error:
        raise StartupError(f"the engine cannot be started: {error.strerror or error}") from error
    sys.argv = sys.argv[:1]  # kserve.model_server parses it at import, abbreviations and all
    import kserve.model_server as kserve_server

    kserve_server.args.configure_logging = False
    runner = _runner(kserve_server, settings, engine)
    runner.start([])
    if runner.failure is not None:
        raise runner.failure
    return 0


def _runner(kserve_server: Any, settings: Settings, engine: EngineClient) -> Any:
    from fastapi.openapi.utils import get_openapi
    from kserve.model_repository import ModelRepository
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from runtime.access import Keys
    from runtime.middleware import Guard
    from runtime.model import DiffusionModel, Repository
    from runtime.protocol import grpc
    from runtime.protocol.openai_errors import error_body, error_headers
    from runtime.routes import ROUTERS
    from runtime.scheduler import Scheduler

    keys = Keys.from_settings(settings.api_key.get_secret_value() if settings.api_key else "", settings.api_key_file)

    class Runner(kserve_server.ModelServer):  # type: ignore[misc]
        """KServe's ModelServer with our routes, our gRPC server, and a stop that drains."""

        failure: StartupError | None = None

        def setup_event_loop(self) -> None:
            pass  # KServe's configures a loop that asyncio.run then replaces

        def register_signal_handler(self) -> None:
            pass  # ours are set on the running loop

        async def _serve(self) -> None:
            loop = asyncio.get_running_loop()
            scheduler = Scheduler(engine, settings)
            model = DiffusionModel(settings, engine, scheduler)
            repository = Repository(model, settings.model_aliases)
            self.dataplane._model_registry = repository
            self._add_routes(repository)
            uvicorn = self._rest_server._server
            uvicorn.capture_signals = contextlib.nullcontext  # SIGTERM must not close the listener: we drain first
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, _on_signal, stop, engine)
            if os.getpid() == 1:
                loop.add_signal_handler(signal.SIGCHLD, _reap_orphans, engine)
            sizes = (settings.grpc_max_send_message_length, settings.grpc_max_receive_message_length)
            grpc_server = grpc.Server(
                settings.grpc_port, self.dataplane, self.model_repository_extension, repository, sizes, 1, keys
            )
            tasks = [asyncio.ensure_future(server) for server in self.servers]
            while not uvicorn.started and not tasks[0].done():  # noqa: ASYNC110 (uvicorn has no event for it)
                await asyncio.sleep(0.01)
            if settings.enable_grpc:
                tasks.append(asyncio.create_task(grpc_server.start()))
            log(logging.INFO, "listening", http=settings.http_port, grpc=settings.grpc_port)
            works = (scheduler.run(), engine.watch(), model.supervise(), model.jobs.run())
            ours = [asyncio.create_task(work) for work in works]
            tasks += ours
            stopping, ends = asyncio.create_task(stop.wait()), 0.0
            try:
                done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
                if stopping in done:
                    ends = loop.time() + settings.grace_period
                    await _drain(model, settings.grace_period)
                self.failure = next((_failure(task) for task in done if task is not stopping), None)
            finally:
                uvicorn.should_exit = True
                for task in ours:  # the supervisor among them, which would start the engine again
                    task.cancel()
                await model.jobs.close(max(1.0, ends - loop.time() - 1.0))
                await grpc_server.stop()
                await engine.stop()
                with contextlib.suppress(asyncio.TimeoutError):  # large answers go on to slow readers
                    await asyncio.wait_for(tasks[0], max(5.0, ends - loop.time() - 2.0))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        def _add_routes(self, repository: ModelRepository) -> None:
            app = kserve_server.app
            for router in ROUTERS:
                app.include_router(router(repository))
            ours = list(app.routes)  # KServe's come behind them and would overwrite their descriptions
            app.openapi = lambda: get_openapi(title="diffusion-runtime", version=__version__, routes=ours)
            app.add_middleware(Guard, max_body_bytes=settings.max_body_bytes, keys=keys)

            async def http_error(request: Request, error: Exception) -> JSONResponse:
                assert isinstance(error, HTTPException)
                path, status = request.scope["path"], error.status_code
                headers = {**(error.headers or {}), **error_headers(path, status)}
                return JSONResponse(error_body(path, status, str(error.detail)), status, headers)

            app.add_exception_handler(HTTPException, http_error)

    return Runner(
        http_port=settings.http_port,
        enable_grpc=False,  # ours replaces it
        enable_docs_url=settings.enable_docs_url,
        enable_latency_logging=False,
        workers=settings.workers,
        timeout_keep_alive=settings.timeout_keep_alive,
        grace_period=settings.grace_period,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )


def _failure(task: asyncio.Future[Any]) -> StartupError:
    error = task.exception()
    if isinstance(error, StartupError):
        return error
    if isinstance(error, OSError):
        return StartupError(str(error))
    log(logging.ERROR, "a part of the server stopped", exc_info=error)
    return StartupError(f"a part of the server stopped: {type(error).__name__ if error else 'it returned'}")


async def _drain(model: DiffusionModel, grace_period: int) -> None:
    """Finish accepted work while new work gets 503; a moment before the grace period ends, tell the rest."""
    log(logging.INFO, "stopping: accepted work finishes, new work gets 503", waiting=model.scheduler.depth)
    try:
        async with asyncio.timeout(max(1.0, grace_period - 3.0)):
            model.jobs.stop_taking()
            await model.scheduler.drain()
            await model.jobs.settled()
    except TimeoutError:
        model.scheduler.abort("the server is shutting down; send the request again")
    await asyncio.sleep(0.2)  # the last answers leave the sockets
    log(logging.INFO, "stopped")


def _on_signal(stop: asyncio.Event, engine: Any) -> None:
    if stop.is_set():  # the second signal: at once, and leave nothing on the GPU
        engine.kill()
        os._exit(1)
    stop.set()


def _reap_orphans(engine: Any) -> None:
    """As PID 1, collect children that others left; the engine itself is collected by its client."""
    with contextlib.suppress(ChildProcessError):
        while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if info.si_pid == engine.pid:
                return
            os.waitpid(info.si_pid, os.WNOHANG)


def _check_port(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise StartupError(f"{name}={port}: {error.strerror}") from None


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread that waits for a store that is away must not hold the end
