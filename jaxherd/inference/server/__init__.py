"""An HTTP server in the shape of OpenAI's API, on the engine of `paged_engine`.

From the wire inwards: `run` (socket, signals, draining), `app` (routes, keys, bodies, event
streams), `protocol` and `messages` (what a request may say), `service` (from a request to the
engine and back, limits, deadlines), `guarding` (a guard and its counts), `engine_thread` (the one
thread that calls the engine), `replies` (what an answer looks like).  Only `run` and `app` need starlette and uvicorn.
"""
