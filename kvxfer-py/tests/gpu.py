"""GPU memory without torch: libcuda by hand, and tensors whose bytes lie there.

torch needs a CUDA build and a real driver. What the connector asks of a tensor is little, and the
stand-in of the driver does the rest.
"""

import ctypes

import rig
import torch


class Gpu:
    """Device 0, with a stream like the one an engine computes on."""

    def __init__(self):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = stream.value

    def _call(self, name, *args):
        code = getattr(self._cuda, name)(*args)
        assert code == 0, f"{name}: {code}"

    def allocate(self, size):
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address):
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address, tensor):
        """In the stream's order; the tensor's bytes are read when the stream gets there."""
        size = tensor.numel() * tensor.element_size()
        source = ctypes.c_void_p(tensor.data_ptr())
        stream = ctypes.c_void_p(self.stream)
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(size), stream
        )

    def download(self, tensor, address):
        """When it returns, the stream is idle."""
        size = tensor.numel() * tensor.element_size()
        target = ctypes.c_void_p(tensor.data_ptr())
        stream = ctypes.c_void_p(self.stream)
        self._call(
            "cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(size), stream
        )
        self.synchronize()

    def synchronize(self):
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))


class DeviceTensor:
    """What the connector asks of a tensor: shape, strides and address."""

    device = torch.device("cuda:0")

    def __init__(self, like, address):
        self._like, self._address = like, address
        self.shape, self.dtype = like.shape, like.dtype

    def stride(self, *dimension):
        return self._like.stride(*dimension)

    def element_size(self):
        return self._like.element_size()

    def data_ptr(self):
        return self._address

    def nbytes(self):
        return self._like.numel() * self._like.element_size()

    def untyped_storage(self):
        return self

    def __getitem__(self, index):
        return self._like[index]


class DeviceRank(rig.Rank):
    """A worker whose KV is on the GPU. The host has a copy, for the model and for the test."""

    gpu: Gpu

    def tensors(self, names, kv):
        host = super().tensors(names, kv)
        self.addresses = {n: self.gpu.allocate(t.nbytes) for n, t in host.items()}
        for name, tensor in host.items():
            self.gpu.upload(self.addresses[name], tensor)
        self.host = host
        return {name: DeviceTensor(t, self.addresses[name]) for name, t in host.items()}

    def before_layer(self, name):
        self.gpu.download(self.host[name], self.addresses[name])

    def after_layer(self, name):
        """Asynchronous: the hook runs before the bytes are there."""
        self.gpu.upload(self.addresses[name], self.host[name])

    def fetch(self):
        """Into the host's copy."""
        for name in self.host:
            self.before_layer(name)
