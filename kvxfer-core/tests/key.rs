//! Content names: what they share and what tells them apart.

use kvxfer_core::ChunkKey;
use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use proptest::prelude::*;

fn layout() -> KvLayout {
    KvLayout {
        model: "m".into(),
        dtype: "bfloat16".into(),
        chunk_tokens: 4,
        shard: (0, 2),
        groups: vec![Group { block_tokens: 2, block_bytes: vec![64] }],
        tags: Default::default(),
    }
}

fn keys(tokens: &[u32], extras: &[&[u8]]) -> Vec<ChunkKey> {
    let chunks = Keyspace::new(b"realm", &layout()).chain(tokens, extras);
    chunks.into_iter().map(|chunk| chunk.key).collect()
}

fn all_differ(a: &[ChunkKey], b: &[ChunkKey]) -> bool {
    a.iter().all(|key| !b.contains(key))
}

/// The bytes of version 1. Other values here mean another [`kvxfer_core::key::KEY_VERSION`].
#[test]
fn golden() {
    let found = format!("{:?}", keys(&[1, 2, 3, 4, 5], &[b"lora"]));
    assert_eq!(found, GOLDEN);
}
const GOLDEN: &str = "[37b159e9eb892157eb35bbe913c69c47a11e5903292a9a0fd83fbec71f83ec7f, \
     c9fc5551f545be7c000f371cfe5dfc59d72c29d9366e32be56a911fe74cfe91e]";

#[test]
fn shapes_and_names() {
    let keyspace = Keyspace::new(b"realm", &layout());
    assert!(keyspace.chain(&[], &[b"x"]).is_empty());
    let tokens: Vec<u32> = keyspace.chain(&[0; 9], &[]).iter().map(|chunk| chunk.tokens).collect();
    assert_eq!(tokens, [4, 4, 1]);
    assert_eq!(keyspace.chain(&[0; 8], &[]).len(), 2);
    let key = ChunkKey([0xAB; 32]);
    assert_eq!(key.to_string(), "abababababababab");
    assert_eq!(format!("{key:?}"), "ab".repeat(32));
    assert_eq!(format!("{keyspace:?}"), "Keyspace { chunk_tokens: 4, .. }");
}

#[test]
fn realm_and_layout_separate_shard_does_not() {
    let tokens = [1, 2, 3, 4, 5];
    let of = |realm: &[u8], layout: &KvLayout| -> Vec<_> {
        Keyspace::new(realm, layout).chain(&tokens, &[]).iter().map(|chunk| chunk.key).collect()
    };
    let base = of(b"realm", &layout());
    assert!(all_differ(&base, &of(b"other", &layout())));
    assert!(all_differ(&base, &of(b"", &layout())));
    assert!(all_differ(&base, &of(b"realm", &KvLayout { model: "n".into(), ..layout() })));
    assert_eq!(base, of(b"realm", &KvLayout { shard: (1, 2), ..layout() }));
}

/// Bytes cannot be pushed from one field into the next.
#[test]
fn fields_are_delimited() {
    // A token's bytes as an extra, a partial chunk's end as an extra, zeros as padding.
    let variants = [
        keys(&[1, 2], &[]),
        keys(&[1], &[&2u32.to_le_bytes()]),
        keys(&[1, 2], &[&[0]]),
        keys(&[1, 2, 0], &[]),
        keys(&[1, 2, 0, 0], &[]),
        keys(&[1, 2], &[&[0; 8]]),
        keys(&[1, 0, 0], &[&[]]),
        // One and the same but for the count of tokens.
        keys(&[1, 8, 0], &[]),
        keys(&[1], &[&[0; 8]]),
    ];
    for (i, a) in variants.iter().enumerate() {
        assert!(variants[..i].iter().all(|b| all_differ(a, b)), "{i}");
    }
    assert_eq!(keys(&[1, 2], &[]), keys(&[1, 2], &[b""]));
    assert_eq!(keys(&[1, 2], &[]), keys(&[1, 2], &[b"", b"past the end"]));
}

proptest! {
    #[test]
    fn shared_tokens_share_keys_up_to_the_first_difference(
        tokens in prop::collection::vec(any::<u32>(), 1..60),
        at: prop::sample::Index,
        flip in 1..=u32::MAX,
    ) {
        let at = at.index(tokens.len());
        let mut other = tokens.clone();
        other[at] ^= flip;
        let (a, b) = (keys(&tokens, &[]), keys(&other, &[]));
        prop_assert_eq!(&a[..at / 4], &b[..at / 4]);
        prop_assert!(all_differ(&a[at / 4..], &b[at / 4..]));

        let full = at / 4;
        let cut = keys(&tokens[..at], &[]);
        prop_assert_eq!(&cut[..full], &a[..full]);
        prop_assert!(all_differ(&cut[full..], &a[full..]));
    }

    #[test]
    fn an_extra_changes_all_keys_from_its_chunk_on(
        tokens in prop::collection::vec(any::<u32>(), 1..60),
        at: prop::sample::Index,
        extra in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        let base = keys(&tokens, &[]);
        let at = at.index(base.len());
        let mut extras = vec![&[][..]; at];
        extras.push(&extra);
        let with = keys(&tokens, &extras);
        prop_assert_eq!(&base[..at], &with[..at]);
        prop_assert!(all_differ(&base[at..], &with[at..]));
    }
}
