//! Copies of libucp that this process has already.

use std::fs;
use std::path::{Path, PathBuf};

use kvxfer_core::{ErrorKind, Result};

/// A file that is mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) path: PathBuf,
    /// Device and inode, as the kernel spells them.
    file: (String, u64),
}

/// Each copy once, in the order of their addresses.
///
/// # Errors
/// `Io`: `/proc` can't be read.
pub(super) fn copies() -> Result<Vec<Copy>> {
    let maps = fs::read("/proc/self/maps").map_err(|error| {
        ErrorKind::Io.error(format!("what is loaded can't be seen in /proc/self/maps: {error}"))
    })?;
    Ok(parse(&String::from_utf8_lossy(&maps)))
}

fn parse(maps: &str) -> Vec<Copy> {
    let mut copies: Vec<Copy> = Vec::new();
    for copy in maps.lines().filter_map(line) {
        if !copies.iter().any(|one| one.file == copy.file) {
            copies.push(copy);
        }
    }
    copies
}

/// `7f00-7f01 r-xp 00001000 08:01 1234    /usr/lib/libucp.so.0.0.0`
fn line(line: &str) -> Option<Copy> {
    let (fields, path) = line.split_at(line.find('/')?);
    let mut fields = fields.split_whitespace().skip(3);
    let file = (fields.next()?.to_owned(), fields.next()?.parse().ok()?);
    // Wheels of others bundle it under names like libucp-1f20ab77.so.0.0.0.
    let name = Path::new(path).file_name()?.to_str()?.strip_prefix("libucp")?;
    let is = name.starts_with(".so") || (name.starts_with('-') && name.contains(".so"));
    is.then(|| Copy { path: path.into(), file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_found_by_name_and_counted_by_file() {
        let maps = "\
7f00-7f01 r--p 00000000 08:01 12                         /usr/lib/libucp.so.0.0.0
7f01-7f02 r-xp 00001000 08:01 12                         /usr/lib/libucp.so.0.0.0
7f02-7f03 r-xp 00000000 08:01 13                         /venv/nixl.libs/libucp-1f20ab77.so.0.0.0
7f03-7f04 r-xp 00000000 08:01 14                         /usr/lib/libucp_tools.so
7f04-7f05 r-xp 00000000 08:01 15                         /usr/lib/libucs.so.0
7f05-7f06 rw-p 00000000 00:00 0                          [heap]
7f06-7f07 rw-p 00000000 00:00 0
";
        let found: Vec<_> = parse(maps).into_iter().map(|copy| copy.path).collect();
        let expected = ["/usr/lib/libucp.so.0.0.0", "/venv/nixl.libs/libucp-1f20ab77.so.0.0.0"]
            .map(PathBuf::from);
        assert_eq!(found, expected);
        assert_eq!(copies().unwrap(), []);
    }
}
