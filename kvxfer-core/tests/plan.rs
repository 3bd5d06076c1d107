//! The planner against a model that looks at one block at a time.

use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::plan::{LayerMemory, Load, layer_loads, layer_writes, parts};
use kvxfer_core::pool::Extent;
use kvxfer_core::sum::{Sum, seed_at, words};
use kvxfer_core::transport::{RegionId, Write};
use kvxfer_core::{BlockId, ErrorKind, NO_BLOCK, SegmentId};
use proptest::prelude::*;

const REGION: RegionId = RegionId(3);

fn layout() -> KvLayout {
    KvLayout {
        model: "m".into(),
        dtype: "float32".into(),
        chunk_tokens: 512,
        shard: (0, 1),
        groups: vec![
            Group { block_tokens: 16, block_bytes: vec![64, 24] },
            Group { block_tokens: 16, block_bytes: vec![40, 8, 16] },
        ],
        tags: Default::default(),
    }
}

/// (block id, segment, offset in it, first word) of each block, straight from the description in
/// `layout`.
fn naive(
    layout: &KvLayout,
    flat: u32,
    extents: &[Extent],
    blocks: &[BlockId],
) -> Vec<(BlockId, SegmentId, u64, u64)> {
    let (group, layer) = layout.layer(flat).unwrap();
    let sizes = &layout.groups[usize::from(group)].block_bytes;
    let bytes = u64::from(sizes[layer as usize]);
    let mut places = Vec::new();
    for extent in extents.iter().filter(|extent| extent.group == group) {
        for j in 0..u64::from(extent.pages) {
            let base = u64::from(extent.page) * layout.page_bytes();
            let before: u64 = sizes[..layer as usize].iter().map(|&b| u64::from(b)).sum();
            places.push((extent.segment, base + u64::from(extent.pages) * before + j * bytes));
        }
    }
    let numbered = blocks.iter().zip(places).enumerate();
    let present = numbered.filter(|(_, (id, _))| **id != NO_BLOCK);
    present.map(|(i, (&id, (segment, at)))| (id, segment, at, i as u64 * words(bytes))).collect()
}

fn expand(memory: &LayerMemory, bytes: u64, loads: &[Load]) -> Vec<(BlockId, SegmentId, u64, u64)> {
    let mut all = Vec::new();
    for Load { copy, word } in loads {
        assert_eq!(copy.region, REGION);
        assert!(copy.len > 0 && copy.len % bytes == 0);
        assert!(copy.len == bytes || memory.stride == bytes);
        for j in 0..copy.len / bytes {
            let from = copy.src + j * bytes - memory.base;
            assert_eq!(from % memory.stride, 0);
            let id = (from / memory.stride) as BlockId;
            all.push((id, copy.segment, copy.dst + j * bytes, word + j * words(bytes)));
        }
    }
    all
}

/// Runs that the naive places fall into: what a planner that merges all it may would emit.
fn fewest(
    memory: &LayerMemory,
    bytes: u64,
    extents: &[Extent],
    layout: &KvLayout,
    places: &[(BlockId, SegmentId, u64, u64)],
) -> usize {
    let extent_of = |segment: SegmentId, at: u64| {
        extents.iter().position(|e| {
            let start = u64::from(e.page) * layout.page_bytes();
            e.segment == segment
                && (start..start + u64::from(e.pages) * layout.page_bytes()).contains(&at)
        })
    };
    let joined = |pair: &&[(BlockId, SegmentId, u64, u64)]| {
        let ((a, s, x, _), (b, t, y, _)) = (pair[0], pair[1]);
        memory.stride == bytes && a + 1 == b && x + bytes == y && extent_of(s, x) == extent_of(t, y)
    };
    places.len() - places.windows(2).filter(joined).count()
}

fn chunk() -> impl Strategy<Value = (Vec<Extent>, Vec<BlockId>)> {
    let piece = (0..3u32, 1..6u16, 0..2u16);
    let ids = prop_oneof![
        4 => (0..90u32, 1..8u32).prop_map(|(id, run)| (id..id + run).collect::<Vec<_>>()),
        1 => (1..3usize).prop_map(|gap| vec![NO_BLOCK; gap]),
    ];
    (prop::collection::vec(piece, 1..8), prop::collection::vec(ids, 0..6), any::<u8>()).prop_map(
        |(pieces, ids, cut)| {
            // Extents of a grant do not overlap: each lies behind the one before.
            let mut page = 5;
            let mut extents = Vec::new();
            for (segment, pages, group) in pieces {
                extents.push(Extent { segment: SegmentId(segment), page, pages, group });
                page += u32::from(pages) + u32::from(cut % 3);
            }
            (extents, ids.concat())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn equals_the_naive_model((extents, mut blocks) in chunk(), flat in 0..5u32, gap in prop_oneof![Just(0), Just(8u64)], base in 0..1000u64) {
        let layout = layout();
        layout.validate().unwrap();
        let (group, layer) = layout.layer(flat).unwrap();
        let bytes = u64::from(layout.block_bytes(group, layer).unwrap());
        let pages: usize = extents.iter().filter(|e| e.group == group).map(|e| usize::from(e.pages)).sum();
        blocks.truncate(pages);
        let memory = LayerMemory { region: REGION, base, stride: bytes + gap, blocks: 100 };

        let mut loads = Vec::new();
        layer_loads(&layout, flat, &memory, &extents, &blocks, &mut loads).unwrap();
        let places = naive(&layout, flat, &extents, &blocks);
        prop_assert_eq!(expand(&memory, bytes, &loads), &places[..]);
        prop_assert_eq!(loads.len(), fewest(&memory, bytes, &extents, &layout, &places));

        let mut writes = vec![];
        layer_writes(&layout, flat, &memory, &extents, &blocks, &mut writes).unwrap();
        prop_assert_eq!(writes, loads.iter().map(|load| load.copy).collect::<Vec<_>>());
    }

    /// A producer that posts the gap-free parts one by one, and a consumer that adds up its loads,
    /// arrive at one sum.
    #[test]
    fn both_sides_sum_alike((extents, mut blocks) in chunk(), flat in 0..5u32, seed: u64, target in 0..50u32) {
        let layout = layout();
        let (group, layer) = layout.layer(flat).unwrap();
        let bytes = u64::from(layout.block_bytes(group, layer).unwrap());
        let pages: usize = extents.iter().filter(|e| e.group == group).map(|e| usize::from(e.pages)).sum();
        blocks.truncate(pages);
        let memory = LayerMemory { region: REGION, base: 0, stride: bytes, blocks: 200 };
        // Each place in the pool holds bytes of its own.
        let stored = |at: u64, len: u64| (at..at + len).map(|at| ((at * 131) >> 3) as u8).collect::<Vec<_>>();

        let mut producer = 0u64;
        for part in parts(&blocks) {
            let mut list = vec![NO_BLOCK; blocks.len()];
            list[part.clone()].copy_from_slice(&blocks[part.clone()]);
            let mut writes = Vec::new();
            layer_writes(&layout, flat, &memory, &extents, &list, &mut writes).unwrap();
            let mut sum = Sum::new(seed_at(seed, part.start as u64 * words(bytes)));
            writes.iter().for_each(|write| sum.update(&stored(write.dst, write.len)));
            producer = producer.wrapping_add(sum.finish());
        }
        // The consumer's blocks lie elsewhere, so its runs are cut differently.
        let ids = blocks.iter().enumerate().map(|(i, &id)| if id == NO_BLOCK { id } else { target + (i as u32 ^ 1) });
        let mut loads = Vec::new();
        layer_loads(&layout, flat, &memory, &extents, &ids.collect::<Vec<_>>(), &mut loads).unwrap();
        let consumer = loads.iter().fold(0u64, |value, load| {
            let mut sum = Sum::at(seed, load.word);
            sum.update(&stored(load.copy.dst, load.copy.len));
            value.wrapping_add(sum.finish())
        });
        prop_assert_eq!(producer, consumer);
    }

    #[test]
    fn parts_are_the_maximal_ranges_without_gaps(present in prop::collection::vec(any::<bool>(), 0..40)) {
        let blocks: Vec<_> = present.iter().map(|&there| if there { 1 } else { NO_BLOCK }).collect();
        let mut seen = vec![false; blocks.len()];
        let mut last_end = None;
        for part in parts(&blocks) {
            prop_assert!(!part.is_empty());
            prop_assert!(last_end.is_none_or(|end| end < part.start));
            last_end = Some(part.end);
            part.for_each(|i| seen[i] = true);
        }
        prop_assert_eq!(seen, present);
    }

    /// Whatever a peer grants, nothing overflows or panics.
    #[test]
    fn wild_extents_never_panic(
        wild in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u16>(), 0..4u16), 0..5),
        flat: u8, base: u64, stride: u64, count: u32,
        blocks in prop::collection::vec(any::<u32>(), 0..20),
    ) {
        let extents: Vec<_> = wild.into_iter()
            .map(|(segment, page, pages, group)| Extent { segment: SegmentId(segment), page, pages, group })
            .collect();
        let memory = LayerMemory { region: REGION, base, stride, blocks: count };
        let mut out = Vec::new();
        let _ = layer_writes(&layout(), u32::from(flat % 8), &memory, &extents, &blocks, &mut out);
        for write in out {
            prop_assert!(write.src.checked_add(write.len).is_some());
            prop_assert!(write.dst.checked_add(write.len).is_some());
        }
    }
}

#[test]
fn refuses_as_a_whole() {
    let layout = layout();
    let memory = LayerMemory { region: REGION, base: 0, stride: 64, blocks: 10 };
    let extents = [Extent { segment: SegmentId(0), page: 0, pages: 4, group: 0 }];
    let mark = Write { region: REGION, src: 1, segment: SegmentId(1), dst: 1, len: 1 };
    let cases: [(u32, LayerMemory, &[BlockId], &str); 5] = [
        (0, memory, &[1, 3, 10], "block 10, the engine has 10"),
        (0, memory, &[0, 1, 2, 3, 4], "5 blocks for 4 granted pages"),
        (5, memory, &[], "layer 5 of a layout of 5 layers"),
        (0, LayerMemory { stride: 63, ..memory }, &[1], "blocks of 64 bytes every 63 bytes"),
        (0, LayerMemory { base: u64::MAX - 600, ..memory }, &[1], "10 blocks, 64 bytes apart"),
    ];
    for (layer, memory, blocks, says) in cases {
        let mut out = vec![mark];
        let error = layer_writes(&layout, layer, &memory, &extents, blocks, &mut out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfBounds);
        assert!(error.to_string().contains(says), "{error} / {says}");
        assert_eq!(out, [mark]);
    }
}

/// 32 consecutive blocks in one extent are one descriptor; scattered ids are 32.
#[test]
fn descriptors_in_and_out() {
    let layout = layout();
    let memory = LayerMemory { region: REGION, base: 0, stride: 64, blocks: 100 };
    let extents = [Extent { segment: SegmentId(0), page: 9, pages: 32, group: 0 }];
    let count = |blocks: &[BlockId]| {
        let mut out = Vec::new();
        layer_writes(&layout, 0, &memory, &extents, blocks, &mut out).unwrap();
        out.len()
    };
    assert_eq!(count(&(10..42).collect::<Vec<_>>()), 1);
    assert_eq!(count(&(10..42).rev().collect::<Vec<_>>()), 32);
    let halves: Vec<_> = (50..66).chain(10..26).collect();
    assert_eq!(count(&halves), 2);
}
