"""Register the second device in a process that imports this: the server of a pool of workers."""

from tests.device.second_device import install

install()
