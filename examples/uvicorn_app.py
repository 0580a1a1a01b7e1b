"""An ASGI application that answers with the output of a program.

uvicorn --app-dir examples uvicorn_app:app --loop aiovspawn:new_event_loop
"""

import asyncio


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    process = await asyncio.create_subprocess_exec("uname", "-s", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": output})
