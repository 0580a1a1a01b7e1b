"""Unchanged asyncio code on a loop of ours: asyncio.Runner (Python 3.11 and newer)."""

import asyncio

import aiovspawn


async def main():
    process = await asyncio.create_subprocess_shell("uname -s | tr a-z A-Z", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    print(output.decode().strip())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=aiovspawn.new_event_loop) as runner:
        runner.run(main())
