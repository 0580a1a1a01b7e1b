"""Options beyond subprocess's: limits without preexec_fn, and a program at a terminal of its own."""

import resource

import aiovspawn


async def main() -> None:
    done = await aiovspawn.run_process(
        ["sh", "-c", "ulimit -n; nice; grep NoNewPrivs /proc/self/status"],
        capture_output=True,
        text=True,
        rlimits={resource.RLIMIT_NOFILE: (64, 64)},
        nice=5,
        no_new_privs=True,
    )
    print("limited to", *done.stdout.split())

    command = "stty size; read name; echo hello $name"
    async with aiovspawn.open_process(command, shell=True, pty=(24, 80)) as process:
        pty = process.pty
        assert pty is not None
        print("a terminal of", (await pty.readline()).decode().strip())
        pty.write(b"terminal\n")
        print(*[line.decode().strip() async for line in pty], sep=", ")


if __name__ == "__main__":
    aiovspawn.run(main())
