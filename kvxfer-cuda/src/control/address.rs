//! Where an agent can be reached.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use kvxfer_core::{Error, ErrorKind};

/// An agent's address, as people write it: `tcp://host:port`, `host:port` or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name or IP address, without brackets, and a port.
    Tcp {
        /// The host.
        host: String,
        /// The port. 0 is for listeners: any free one.
        port: u16,
    },
    /// The absolute path of a Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// A TCP address.
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::Tcp { host: host.into(), port }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self, Error> {
        let wrong = |why: &str| {
            ErrorKind::Config
                .error(format!("the address {given:?} {why}"))
                .fix("write tcp://host:port, host:port or unix:/path")
        };
        if let Some(path) = given.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path.starts_with('/') && path.len() > 1 && !path.contains('\0') {
                true => Ok(Self::Unix(path.into())),
                false => Err(wrong("does not name an absolute path")),
            };
        }
        let rest = match given.split_once("://") {
            Some(("tcp", rest)) => rest,
            Some((scheme, _)) => return Err(wrong(&format!("has the unknown scheme {scheme:?}"))),
            None => given,
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| wrong("has no port"))?;
        let port =
            port.parse().map_err(|_| wrong(&format!("has {port:?} where its port should be")))?;
        let host = match host.strip_prefix('[').map(|host| host.strip_suffix(']')) {
            Some(Some(host)) if host.parse::<Ipv6Addr>().is_ok() => host,
            Some(_) => return Err(wrong("has brackets around something that is not IPv6")),
            None if host.contains(':') => return Err(wrong("has an IPv6 host without brackets")),
            None => host,
        };
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/@?#[]".contains(c);
        match host {
            "" => Err(wrong("has no host")),
            host if host.contains(odd) => Err(wrong("has a host that cannot be one")),
            host => Ok(Self::tcp(host, port)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_to_the_same() {
        for (given, printed) in [
            ("tcp://decode-0.svc:55555", "tcp://decode-0.svc:55555"),
            ("10.0.0.1:0", "tcp://10.0.0.1:0"),
            ("[::1]:7", "tcp://[::1]:7"),
            ("unix:/run/kvxfer/a.sock", "unix:/run/kvxfer/a.sock"),
            ("unix:///run/a", "unix:/run/a"),
        ] {
            let address: Address = given.parse().unwrap();
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse::<Address>().unwrap(), address);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (given, about) in [
            ("", "has no port"),
            ("host", "has no port"),
            (":80", "has no host"),
            ("host:", "has \"\" where its port"),
            ("host:70000", "has \"70000\""),
            ("::1:80", "without brackets"),
            ("[::1:80", "brackets"),
            ("[host]:80", "not IPv6"),
            ("http://host:80", "scheme \"http\""),
            ("ho st:80", "cannot be one"),
            ("host/x:80", "cannot be one"),
            ("unix:relative", "absolute path"),
            ("unix:", "absolute path"),
        ] {
            let error = given.parse::<Address>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            let text = error.to_string();
            assert!(text.contains(about), "{text}");
            assert!(text.contains(&format!("{given:?}")) && text.contains("unix:/path"), "{text}");
        }
    }
}
