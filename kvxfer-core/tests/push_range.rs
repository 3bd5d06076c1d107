//! Block tables cut into chunks.

use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::session::PushRange;
use kvxfer_core::{ErrorKind, OfferId};

/// Chunks of 64 tokens: four blocks of the first group, two of the second.
fn layout() -> KvLayout {
    let group = |block_tokens| Group { block_tokens, block_bytes: vec![8] };
    let mut layout = KvLayout::one_group("m", "d", 64, group(16));
    layout.groups.push(group(32));
    layout
}

fn cut(tables: &[Vec<u32>]) -> Result<Vec<Vec<Vec<u32>>>, ErrorKind> {
    let range = PushRange::new(&layout(), OfferId(7), 3, tables).map_err(|error| error.kind())?;
    assert_eq!((range.offer, range.first_chunk), (OfferId(7), 3));
    Ok(range.blocks.iter().map(|chunk| chunk.to_vec()).collect())
}

#[test]
fn tables_are_cut_where_chunks_end() {
    assert_eq!(cut(&[vec![], vec![]]), Ok(vec![]));
    assert_eq!(cut(&[vec![1], vec![9]]), Ok(vec![vec![vec![1], vec![9]]]));
    let six_blocks = cut(&[vec![1, 2, 3, 4, 5, 6], vec![7, 8, 9]]);
    let chunks = vec![vec![vec![1, 2, 3, 4], vec![7, 8]], vec![vec![5, 6], vec![9]]];
    assert_eq!(six_blocks, Ok(chunks));
}

#[test]
fn tables_that_contradict_each_other_are_refused() {
    for tables in [
        vec![],
        vec![vec![1]],
        vec![vec![1], vec![2], vec![3]],
        vec![vec![1], vec![]],
        vec![vec![1], vec![1, 2, 3]],
        vec![vec![1, 2, 3, 4, 5], vec![1, 2]],
    ] {
        assert_eq!(cut(&tables), Err(ErrorKind::Config), "{tables:?}");
    }
}
