"""The same on uvloop, with options that uvloop's own subprocess_exec() rejects. Needs aiovspawn[uvloop]."""

import asyncio

import aiovspawn


async def main():
    process = await asyncio.create_subprocess_shell("umask", umask=0o27, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    print(type(asyncio.get_running_loop()).__module__, *output.decode().split())


if __name__ == "__main__":
    aiovspawn.uvloop.run(main())
