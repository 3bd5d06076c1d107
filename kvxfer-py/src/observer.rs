//! The scheduler half's observer.

use std::time::Duration;

use kvxfer_core::wire::message::{ClaimStatus, Next};
use kvxfer_core::{ClaimId, OfferId, Result};
use kvxfer_cuda::ObserverHandle;
use pyo3::prelude::*;

use crate::errors::raise;
use crate::keys::Keys;

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Observer(ObserverHandle);

#[pymethods]
impl Observer {
    #[new]
    fn new(py: Python<'_>, addresses: Vec<String>, name: &str) -> PyResult<Self> {
        let addresses: Vec<_> = addresses
            .iter()
            .map(|address| address.parse())
            .collect::<Result<_>>()
            .map_err(raise)?;
        py.detach(|| ObserverHandle::connect(addresses, name)).map(Self).map_err(raise)
    }

    fn offer(&self, py: Python<'_>, request: &str, keys: &Keys) -> u64 {
        py.detach(|| self.0.offer(request, &keys.0)).0
    }

    fn withdraw(&self, py: Python<'_>, offer: u64) {
        py.detach(|| self.0.withdraw(OfferId(offer)));
    }

    fn claim(&self, py: Python<'_>, request: &str, keys: &Keys, timeout: f64) -> u64 {
        let patience = Duration::try_from_secs_f64(timeout).unwrap_or_default();
        py.detach(|| self.0.claim(request, &keys.0, patience)).0
    }

    fn status(&self, py: Python<'_>, claim: u64) -> (u32, u32, &'static str) {
        told(py.detach(|| self.0.status(ClaimId(claim))))
    }

    fn settled(
        &self,
        py: Python<'_>,
        claim: u64,
        seconds: f64,
    ) -> Option<(u32, u32, &'static str)> {
        let patience = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        py.detach(|| self.0.settled(ClaimId(claim), patience)).map(|status| told(Some(status)))
    }

    #[pyo3(signature = (claim, keep_from=0, keep_to=0))]
    fn release(&self, py: Python<'_>, claim: u64, keep_from: u32, keep_to: u32) {
        py.detach(|| self.0.release(ClaimId(claim), keep_from, keep_to));
    }

    fn pushed(&self, py: Python<'_>) -> Vec<(u64, Vec<u32>)> {
        let pushed = py.detach(|| self.0.pushed());
        pushed.into_iter().map(|(offer, chunks)| (offer.0, chunks)).collect()
    }

    fn wait(&self, py: Python<'_>, seconds: f64) -> bool {
        let patience = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        py.detach(|| self.0.wait(patience))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.close()).map_err(raise)
    }
}

fn told(status: Option<ClaimStatus>) -> (u32, u32, &'static str) {
    let Some(status) = status else { return (0, 0, "waiting") };
    let next = match status.next {
        Next::Done => "done",
        Next::Asking => "asking",
        Next::Writing => "writing",
        Next::Stalled => "stalled",
        Next::Missing => "missing",
        Next::Lost => "lost",
        Next::NoProducer => "no-producer",
    };
    (status.ready, status.coming, next)
}
