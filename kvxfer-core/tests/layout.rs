//! The geometry: what it accepts, where it says bytes lie, and when two sides fit.

use std::collections::{BTreeMap, HashSet};

use kvxfer_core::layout::{Group, KvLayout, MAX_GROUPS, MAX_LAYERS, MAX_PAGE_BYTES, MAX_STRING};
use kvxfer_core::pool::Extent;
use kvxfer_core::{ErrorKind, SegmentId};

fn layout() -> KvLayout {
    KvLayout {
        model: "m@1".into(),
        dtype: "bfloat16".into(),
        chunk_tokens: 64,
        shard: (0, 1),
        groups: vec![
            Group { block_tokens: 16, block_bytes: vec![128, 64, 8] },
            Group { block_tokens: 32, block_bytes: vec![256] },
        ],
        tags: BTreeMap::from([("cache layout".into(), "NHD".into())]),
    }
}

#[test]
fn addresses() {
    let layout = layout();
    layout.validate().unwrap();
    assert_eq!(layout.page_bytes(), 256);
    assert_eq!(layout.layers(), 4);
    let flat: Vec<_> = (0..5).map(|flat| layout.layer(flat)).collect();
    assert_eq!(flat, [Some((0, 0)), Some((0, 1)), Some((0, 2)), Some((1, 0)), None]);
    for (flat, place) in flat[..4].iter().enumerate() {
        let (group, layer) = place.unwrap();
        assert_eq!(layout.flat_layer(group, layer), Some(flat as u32));
    }
    assert_eq!(layout.flat_layer(0, 3), None);
    assert_eq!(layout.flat_layer(2, 0), None);
    assert_eq!(layout.layer_offset(0, 2), Some(192));
    assert_eq!(layout.layer_offset(0, 3), None);

    let extent = Extent { segment: SegmentId(0), page: 10, pages: 3, group: 0 };
    assert_eq!(layout.layer_span(&extent, 0), Some((2560, 384)));
    assert_eq!(layout.layer_span(&extent, 1), Some((2560 + 384, 192)));
    assert_eq!(layout.layer_span(&extent, 2), Some((2560 + 576, 24)));
    assert_eq!(layout.layer_span(&extent, 3), None);
    assert_eq!(layout.layer_span(&Extent { group: 9, ..extent }, 0), None);
}

/// Layers of an extent neither overlap nor leave its pages.
#[test]
fn layers_tile_the_extent() {
    let layout = layout();
    for pages in 1..9 {
        for group in 0..2 {
            let extent = Extent { segment: SegmentId(0), page: 7, pages, group };
            let mut next = 7 * layout.page_bytes();
            for layer in 0..layout.groups[usize::from(group)].block_bytes.len() as u32 {
                let (start, len) = layout.layer_span(&extent, layer).unwrap();
                assert_eq!(start, next);
                next += len;
            }
            assert!(next <= (7 + u64::from(pages)) * layout.page_bytes());
        }
    }
}

#[test]
fn chunks_and_pieces() {
    let layout = layout();
    assert_eq!(layout.chunk_count(0), 0);
    assert_eq!(layout.chunk_count(64), 1);
    assert_eq!(layout.chunk_count(65), 2);
    assert_eq!(layout.chunk_tokens_at(65, 0), 64);
    assert_eq!(layout.chunk_tokens_at(65, 1), 1);
    assert_eq!(layout.chunk_tokens_at(65, 2), 0);
    assert_eq!(layout.chunk_tokens_at(u32::MAX, u32::MAX), 0);
    assert_eq!(layout.chunk_pieces(64).collect::<Vec<_>>(), [(0, 4), (1, 2)]);
    assert_eq!(layout.chunk_pieces(33).collect::<Vec<_>>(), [(0, 3), (1, 2)]);
    assert_eq!(layout.chunk_pieces(1).collect::<Vec<_>>(), [(0, 1), (1, 1)]);
    assert_eq!(layout.blocks(2, 64), 0);
}

#[test]
fn refuses_what_makes_no_sense() {
    type Change = fn(&mut KvLayout);
    let changes: [(Change, &str); 16] = [
        (|l| l.chunk_tokens = 0, "chunk of 0 tokens"),
        (|l| l.chunk_tokens = 48, "in blocks of 32 (group 1)"),
        (|l| l.groups[0].block_tokens = 0, "in blocks of 0"),
        (|l| l.groups.clear(), "0 groups"),
        (|l| l.groups[1].block_bytes.clear(), "group 1 has no layers"),
        (|l| l.groups[0].block_bytes[1] = 0, "layer 1 of group 0 is 0 bytes"),
        (|l| l.groups[0].block_bytes[1] = 12, "not a multiple of 8"),
        (|l| l.groups[0].block_bytes = vec![8; MAX_LAYERS], "4097 layers"),
        (|l| l.groups = vec![l.groups[1].clone(); MAX_GROUPS + 1], "65 groups"),
        (|l| l.groups[0].block_bytes = vec![1 << 30, 8], "at most 1073741824"),
        (|l| l.groups[0].block_bytes = vec![u32::MAX - 7; 4000], "at most 1073741824"),
        (|l| l.model = "m".repeat(MAX_STRING + 1), "1025 bytes"),
        (|l| l.dtype = "m".repeat(MAX_STRING + 1), "1025 bytes"),
        (|l| drop(l.tags.insert("m".repeat(MAX_STRING + 1), String::new())), "1025 bytes"),
        (|l| l.tags = (0..65).map(|i| (i.to_string(), String::new())).collect(), "65 tags"),
        (|l| l.shard = (2, 2), "shard 2 of 2"),
    ];
    for (change, says) in changes {
        let mut layout = layout();
        change(&mut layout);
        let error = layout.validate().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(says), "{error} / {says}");
    }
}

/// No extent there can be has an address that overflows.
#[test]
fn the_largest_page_fits() {
    let mut layout = layout();
    layout.groups = vec![Group { block_tokens: 64, block_bytes: vec![1 << 29, 1 << 29] }];
    layout.validate().unwrap();
    assert_eq!(layout.page_bytes(), MAX_PAGE_BYTES);
    let extent = Extent { segment: SegmentId(0), page: u32::MAX, pages: u16::MAX, group: 0 };
    let (start, len) = layout.layer_span(&extent, 1).unwrap();
    assert!(start.checked_add(len).unwrap() < 1 << 63);
}

#[test]
fn mismatches_name_the_field_and_both_values() {
    type Change = fn(&mut KvLayout);
    let changes: [(Change, &str); 10] = [
        (|l| l.model = "m@2".into(), r#"model: the consumer has "m@1", the producer "m@2""#),
        (|l| l.dtype = "fp8".into(), r#"dtype: the consumer has "bfloat16", the producer "fp8""#),
        (|l| l.chunk_tokens = 128, "chunk_tokens: the consumer has 64, the producer 128"),
        (|l| drop(l.groups.pop()), "number of KV-cache groups: the consumer has 2, the producer 1"),
        (
            |l| l.groups[1].block_tokens = 16,
            "tokens per block of group 1: the consumer has 32, the producer 16",
        ),
        (
            |l| l.groups[0].block_bytes.truncate(1),
            "layers of group 0: the consumer has 3, the producer 1",
        ),
        (
            |l| l.groups[0].block_bytes[1] = 72,
            "bytes per block of layer 1 of group 0: the consumer has 64, the producer 72",
        ),
        (
            |l| drop(l.tags.insert("cache layout".into(), "HND".into())),
            r#""cache layout": the consumer has "NHD", the producer "HND""#,
        ),
        (
            |l| drop(l.tags.insert("x".into(), "y".into())),
            r#""x": the consumer has none, the producer "y""#,
        ),
        (|l| l.tags.clear(), r#""cache layout": the consumer has "NHD", the producer none"#),
    ];
    let ours = layout();
    ours.compatible_with(&ours.clone()).unwrap();
    let mut fingerprints = HashSet::from([ours.fingerprint()]);
    for (change, says) in changes {
        let mut theirs = ours.clone();
        change(&mut theirs);
        let error = ours.compatible_with(&theirs).unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::LayoutMismatch && error.lasting(), "{error:?}");
        assert!(text.starts_with(&format!("{says} (")), "the field, then the fix: {text}");
        assert!(fingerprints.insert(theirs.fingerprint()), "{says}");
    }
}

#[test]
fn shards_must_be_equal_and_are_not_in_the_fingerprint() {
    let ours = KvLayout { shard: (0, 2), ..layout() };
    let other_size = KvLayout { shard: (0, 4), ..layout() };
    let error = ours.compatible_with(&other_size).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LayoutMismatch);
    assert!(error.to_string().contains("the consumer has 2, the producer 4"), "{error}");
    assert!(error.to_string().contains("unlike sizes are not supported"), "{error}");
    let other_rank = KvLayout { shard: (1, 2), ..layout() };
    let error = ours.compatible_with(&other_rank).unwrap_err();
    assert!(error.to_string().contains("rank: the consumer has 0, the producer 1"), "{error}");
    assert_eq!(ours.fingerprint(), other_size.fingerprint());
    assert_eq!(ours.fingerprint(), other_rank.fingerprint());
}

/// Moving bytes between neighbouring fields changes the fingerprint.
#[test]
fn fields_of_the_fingerprint_are_delimited() {
    let base = layout();
    let mut moved = base.clone();
    moved.model = "m@1b".into();
    moved.dtype = "float16".into();
    assert_ne!(base.fingerprint(), moved.fingerprint());
    let tags = |pairs: &[(&str, &str)]| KvLayout {
        tags: pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        ..base.clone()
    };
    assert_ne!(tags(&[("ab", "c")]).fingerprint(), tags(&[("a", "bc")]).fingerprint());
}

#[test]
fn a_mismatch_fits_into_a_message() {
    let ours = KvLayout { model: "\u{1}".repeat(MAX_STRING), ..layout() };
    let theirs = KvLayout { model: "\u{2}".repeat(MAX_STRING), ..layout() };
    assert!(ours.compatible_with(&theirs).unwrap_err().to_string().len() <= MAX_STRING);
    let name = "é".repeat(MAX_STRING / 2);
    let theirs = KvLayout { tags: [(name.clone(), name)].into(), ..layout() };
    assert!(layout().compatible_with(&theirs).unwrap_err().to_string().len() <= MAX_STRING);
}
