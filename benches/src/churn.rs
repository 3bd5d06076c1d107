//! A pool as it looks after hours of requests.

use kvxfer_core::pool::{Extent, Geometry, Pool};
use kvxfer_core::{GrantId, Incarnation};

use crate::random::Random;

/// Who is granted everything here.
pub const WRITER: Incarnation = Incarnation([1; 16]);
const SEGMENTS: u32 = 8;
const PAGES: u32 = 4096;

/// A pool of 8 segments and 32,768 pages, all free.
pub fn fresh() -> Pool {
    Pool::new(Geometry { segments: SEGMENTS, pages_per_segment: PAGES })
}

/// The same, three quarters full, after 100,000 requests of 1 to 32 chunks (16 pages each, the last one shorter) that
/// ended in no particular order. `f64`: extents a chunk at the end, 1 being as good as new.
pub fn churned() -> (Pool, f64) {
    let (mut pool, mut random, mut grant) = (fresh(), Random(3), 0_u64);
    let mut requests: Vec<Vec<(GrantId, Vec<Extent>)>> = Vec::new();
    let mut before = (0, 0);
    for round in 0..100_000 {
        if round == 90_000 {
            let stats = pool.stats();
            before = (stats.pieces_granted, stats.extents_granted);
        }
        let pages = 1 + random.below(32 * 16);
        let free = |pool: &Pool| pool.count(kvxfer_core::pool::PageState::Free);
        while free(&pool) < SEGMENTS * PAGES / 4 + pages {
            let victim = random.below(requests.len() as u32) as usize;
            for (grant, extents) in requests.swap_remove(victim) {
                pool.free(grant, &extents).expect("it was granted");
            }
        }
        let mut chunks = Vec::new();
        for first in (0..pages).step_by(16) {
            let (mut extents, pages) = (Vec::new(), 16.min(pages - first));
            grant += 1;
            let pieces = [(0, pages)];
            pool.grant(WRITER, GrantId(grant), &pieces, &mut extents).expect("there is room");
            chunks.push((GrantId(grant), extents));
        }
        requests.push(chunks);
    }
    let stats = pool.stats();
    let pieces = stats.pieces_granted - before.0;
    (pool, (stats.extents_granted - before.1) as f64 / pieces as f64)
}
