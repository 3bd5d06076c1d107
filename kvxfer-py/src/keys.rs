//! Layouts and keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvxfer_core::ErrorKind;
use kvxfer_core::key::Keyspace as CoreKeyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::wire::message::Chunk;
use pyo3::prelude::*;

use crate::errors::raise;

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Layout(pub(crate) KvLayout);

#[pymethods]
impl Layout {
    #[new]
    #[pyo3(signature = (*, model, dtype, chunk_tokens, groups, shard=(0, 1), tags=BTreeMap::new()))]
    fn new(
        model: String,
        dtype: String,
        chunk_tokens: u32,
        groups: Vec<(u32, Vec<u32>)>,
        shard: (u32, u32),
        tags: BTreeMap<String, String>,
    ) -> PyResult<Self> {
        let groups = groups
            .into_iter()
            .map(|(block_tokens, block_bytes)| Group { block_tokens, block_bytes })
            .collect();
        let layout = KvLayout { model, dtype, chunk_tokens, shard, groups, tags };
        layout.validate().map_err(raise)?;
        Ok(Self(layout))
    }

    #[getter]
    fn page_bytes(&self) -> u64 {
        self.0.page_bytes()
    }

    #[getter]
    fn fingerprint(&self) -> String {
        self.0.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[getter]
    fn chunk_tokens(&self) -> u32 {
        self.0.chunk_tokens
    }
}

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Keys(pub(crate) Arc<[Chunk]>);

#[pymethods]
impl Keys {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.0.iter().map(|chunk| u64::from(chunk.tokens)).sum()
    }
}

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Keyspace {
    keyspace: CoreKeyspace,
    chunk_tokens: u32,
}

#[pymethods]
impl Keyspace {
    #[new]
    #[pyo3(signature = (layout, realm=None))]
    fn new(layout: &Layout, realm: Option<&[u8]>) -> Self {
        let keyspace = CoreKeyspace::new(realm.unwrap_or_default(), &layout.0);
        Self { keyspace, chunk_tokens: layout.0.chunk_tokens }
    }

    #[pyo3(signature = (tokens, extras=None))]
    fn chain(&self, py: Python<'_>, tokens: &[u8], extras: Option<Vec<Vec<u8>>>) -> PyResult<Keys> {
        let tokens = words(tokens)?;
        let extras = extras.unwrap_or_default();
        let chunks = tokens.len().div_ceil(self.chunk_tokens as usize);
        if !extras.is_empty() && extras.len() != chunks {
            return Err(raise(
                ErrorKind::Config.error(format!("{} extras for {chunks} chunks", extras.len())),
            ));
        }
        let chunks = py.detach(|| {
            let extras: Vec<&[u8]> = extras.iter().map(Vec::as_slice).collect();
            self.keyspace.chain(&tokens, &extras)
        });
        Ok(Keys(chunks.into()))
    }
}

/// Little-endian u32s.
pub(crate) fn words(bytes: &[u8]) -> PyResult<Vec<u32>> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        let what = format!("{} bytes are no list of 32-bit numbers", bytes.len());
        return Err(raise(ErrorKind::Config.error(what)));
    }
    Ok(words.iter().map(|&word| u32::from_le_bytes(word)).collect())
}
