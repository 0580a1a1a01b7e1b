"""A loop that somebody else made takes the fast path while it is attached."""

import asyncio

import aiovspawn


async def main():
    detach = aiovspawn.attach(asyncio.get_running_loop())
    process = await asyncio.create_subprocess_exec("uname", "-s", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    print(output.decode().strip())
    detach()


if __name__ == "__main__":
    asyncio.run(main())
