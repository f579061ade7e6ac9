"""Print the messages of ComfyUI's websocket, one JSON line each. Runs in ComfyUI's interpreter.

python listen.py URL CLIENT_ID SECONDS
"""

import asyncio
import json
import struct
import sys

import aiohttp


async def listen(url: str, client: str, seconds: float) -> None:
    """Print messages until a prompt ends or the time is over; previews as event number and size in bytes."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/ws?clientId={client}") as socket,
    ):
        end = asyncio.get_running_loop().time() + seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            message = await socket.receive(timeout=left)
            if message.type == aiohttp.WSMsgType.BINARY:
                entry = {
                    "type": "binary",
                    "event": struct.unpack(">I", message.data[:4])[0],
                    "size": len(message.data),
                }
            elif message.type == aiohttp.WSMsgType.TEXT:
                entry = json.loads(message.data)
            else:
                return
            print(json.dumps(entry), flush=True)
            if entry["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                return


asyncio.run(listen(sys.argv[1], sys.argv[2], float(sys.argv[3])))
