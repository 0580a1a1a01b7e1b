"""anyio on a loop of ours: its run_process() and open_process() take the fast path."""

import anyio

import aiovspawn


async def main():
    done = await anyio.run_process(["uname", "-s"])
    print(done.stdout.decode().strip())


if __name__ == "__main__":
    anyio.run(main, backend_options={"loop_factory": aiovspawn.new_event_loop})
