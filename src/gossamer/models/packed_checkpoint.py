"""A folder that Gossamer wrote as a checkpoint: packed arrays, mapped, which loading copies as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.folder import Folder
from gossamer.errors import CheckpointError, FormatError, UnsupportedError
from gossamer.formats import Packed, RowSource, SiteFormat, parse
from gossamer.formats.node import Field, PackedSource
from gossamer.models.checkpoint import StoredTensor, expect_shape, refuse_unknown
from gossamer.models.config import shown
from gossamer.models.hf_checkpoint import InFolder
from gossamer.models.topology import Site

__all__ = ["LAYOUT", "PackedFolder"]

F32 = npt.NDArray[np.float32]

LAYOUT = 1  # version of the packed byte layout; see docs/formats.md


class PackedFolder(InFolder):
    kind = "gossamer"

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        where = f"{folder.path.name}/gossamer.json"
        assert folder.gossamer is not None  # what open_checkpoint looked at
        self.ledger = folder.gossamer
        version = self.ledger.get("layout")
        if version != LAYOUT:
            raise UnsupportedError(f"{where} has layout version {shown(version)}; this release reads version {LAYOUT}.")
        self.config = replace(self.config, biased=self.config.biased | self._own_biases(where))
        formats = self.ledger.get("formats")
        if not isinstance(formats, dict) or not all(isinstance(v, str) for v in formats.values()):
            raise CheckpointError(f"{where} has no 'formats' that map each site to an expression.")
        if surplus := sorted(set(formats) - {s.name for s in self.topology.sites}):
            raise CheckpointError(f"{where} gives a format for {shown(surplus[0])}, which is no site of this model.")
        self._formats: dict[str, SiteFormat] = {}
        self._owner: dict[str, Site] = {}  # of each packed array
        known = self._check_vectors()
        for site in self.topology.sites:
            if site.name not in formats:
                raise CheckpointError(f"{where} gives no format for the site '{site.name}'.")
            try:
                fmt = self._formats[site.name] = parse(formats[site.name])
                fmt.weight.check(site.rows, site.cols)
            except FormatError as error:
                raise CheckpointError(f"{where}, site '{site.name}': {error}") from None
            for name, field in fmt.weight.fields(site.rows, site.cols).items():
                self._check_array(f"{site.name}.{name}", field)
                self._owner[f"{site.name}.{name}"] = site
        refuse_unknown(self.path.name, set(folder.tensors) - known - set(self._owner))

    def _own_biases(self, where: str) -> frozenset[str]:
        """Sites that were given a bias, which config.json has no words for."""
        names = self.ledger.get("biases", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{where} has 'biases' that are not a list of sites.")
        sites = {s.name for s in self.topology.sites if s.role != "embed"}
        if surplus := sorted(set(names) - sites):
            raise CheckpointError(f"{where} gives a bias to {shown(surplus[0])}, which is no site that takes one.")
        return frozenset(names)

    def _check_array(self, name: str, field: Field) -> None:
        """Type and length of a packed array, as its header says: a gap is found before anything is loaded."""
        info = self._info(name)
        if field.exact:
            expect_shape(self.path.name, name, info.shape, (field.length,))
        if info.dtype != field.dtype or not field.fits(field.numpy, info.shape):
            raise CheckpointError(
                f"{self.path.name}: tensor '{name}' must be {field.wanted} of {field.dtype}, but is "
                f"{info.dtype} {list(info.shape)}."
            )

    def native(self, site: Site) -> SiteFormat:
        return self._formats[site.name]

    def stored(self, site: Site) -> Packed:
        """The packed arrays as they lie in the file, memory-mapped."""
        weight = self._formats[site.name].weight
        arrays = {field: self.folder.raw(f"{site.name}.{field}") for field in weight.fields(site.rows, site.cols)}
        packed = Packed(weight, (site.rows, site.cols), arrays)
        try:
            packed.validate(f"{self.path.name}: {site.name}")
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        return packed

    def source(self, site: Site) -> RowSource:
        return PackedSource(self.stored(site))

    def pack(self, site: Site, fmt: SiteFormat | None = None) -> Packed:
        if fmt is None or fmt.weight == self._formats[site.name].weight:
            return self.stored(site)
        return super().pack(site, fmt)

    def release(self, site: Site) -> None:
        for field in self._formats[site.name].weight.fields(site.rows, site.cols):
            self.folder.release(f"{site.name}.{field}")

    def tensors(self) -> Iterator[StoredTensor]:
        for name, info in self.folder.tensors.items():
            site = self._owner.get(name)
            runs = "f32" if site is None else str(self._formats[site.name])
            yield StoredTensor(name, info.dtype, info.shape, info.nbytes, runs)

    def provenance(self) -> dict[str, Any]:
        large = ("formats", "sites", "check", "predicted", "measured")
        return {k: v for k, v in self.ledger.items() if k not in large}
