"""Unchanged asyncio code on a loop of ours: asyncio.run() with a loop factory (Python 3.12 and newer)."""

import asyncio

import aiovspawn


async def main():
    process = await asyncio.create_subprocess_exec("uname", "-s", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    print(output.decode().strip())


if __name__ == "__main__":
    asyncio.run(main(), loop_factory=aiovspawn.new_event_loop)
