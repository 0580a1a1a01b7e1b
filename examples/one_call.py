"""subprocess.run() for asyncio: results, limits, and a process with a scope."""

import subprocess

import aiovspawn


async def main() -> None:
    done = await aiovspawn.run_process(["uname", "-sm"], capture_output=True, text=True, check=True)
    print(f"{done.stdout.strip()}: pid {done.pid}, {done.duration * 1000:.1f} ms")

    try:
        await aiovspawn.run_process(["sleep", "60"], timeout=0.1)
    except subprocess.TimeoutExpired as exc:
        print(exc)

    try:
        await aiovspawn.run_process(["yes"], stdout=aiovspawn.PIPE, output_limit=1_000_000)
    except aiovspawn.OutputLimitExceeded as exc:
        print(exc)

    async with aiovspawn.open_process("cat", stdin=aiovspawn.PIPE, stdout=aiovspawn.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hello from cat\n")
        print((await process.stdout.readline()).decode(), end="")
    print("cat has ended with", process.returncode)


if __name__ == "__main__":
    aiovspawn.run(main())
