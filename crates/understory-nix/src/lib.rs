//! Nix's formats, pure: bytes in, values out.
//!
//! Nothing here opens a file, a socket or a thread. Streaming readers and writers are
//! generic over [`std::io::Read`], [`std::io::BufRead`] and [`std::io::Write`]; the caller
//! owns the stream.

pub mod content_address;
pub mod derivation;
pub mod export;
pub mod hash;
pub mod nar;
pub mod narinfo;
pub mod nix32;
pub mod path_info;
pub mod realisation;
pub mod signature;
pub mod store_path;
pub mod wire;
pub mod worker;

pub use content_address::{ContentAddress, ContentAddressMethod};
pub use hash::{Hash, HashAlgorithm, NarHash};
pub use path_info::PathInfo;
pub use signature::{PublicKey, PublicKeys, SecretKey, Signature};
pub use store_path::{StoreDir, StorePath, StorePathHash, StorePathName};
