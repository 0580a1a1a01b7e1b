import asyncio

import pytest


@pytest.mark.asyncio
async def test_uname():
    process = await asyncio.create_subprocess_exec("uname", "-s", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.strip() == b"Linux"
