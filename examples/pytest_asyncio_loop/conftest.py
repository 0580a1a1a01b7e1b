"""All async tests of this folder run on a loop of ours (pytest-asyncio 1.4 and newer)."""

import aiovspawn


def pytest_asyncio_loop_factories(config, item):
    return {"aiovspawn": aiovspawn.new_event_loop}
