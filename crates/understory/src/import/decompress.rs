//! Compressed NAR files.

use crate::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use understory_nix::narinfo::Compression;

/// Most memory that one decompressor takes. `xz -9` needs 65 MiB, zstd's own limit is a window of
/// 128 MiB (`--long=27`); a file that needs more is refused.
pub const DECOMPRESSOR_BYTES_MAX: u64 = 128 << 20;
/// Buffer between decompressor and NAR reader.
const BUFFER_BYTES: usize = 64 << 10;

/// Reads what `compression` packed into `stream`. Several members after each other are read as one,
/// and a member that is cut off is an error.
pub(crate) fn decompress<'a>(
    stream: impl BufRead + 'a,
    compression: &Compression,
) -> Result<Box<dyn BufRead + 'a>> {
    let failed = |e: std::io::Error| Error::environment("starting the decompressor").with_source(e);
    let reader: Box<dyn Read + 'a> = match compression {
        Compression::None => return Ok(Box::new(stream)),
        Compression::Xz => {
            let flags = liblzma::stream::CONCATENATED;
            let decoder =
                liblzma::stream::Stream::new_stream_decoder(DECOMPRESSOR_BYTES_MAX, flags)
                    .map_err(|e| failed(e.into()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(stream, decoder))
        }
        Compression::Zstd => {
            Box::new(zstd::stream::read::Decoder::with_buffer(stream).map_err(failed)?)
        }
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(stream)),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        Compression::Brotli => Box::new(brotli::Decompressor::new(stream, BUFFER_BYTES)),
        Compression::Other(name) => match name.as_str() {
            "lzip" => {
                let flags = liblzma::stream::CONCATENATED;
                let decoder =
                    liblzma::stream::Stream::new_lzip_decoder(DECOMPRESSOR_BYTES_MAX, flags)
                        .map_err(|e| failed(e.into()))?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(stream, decoder))
            }
            "lzma" => {
                let decoder = liblzma::stream::Stream::new_lzma_decoder(DECOMPRESSOR_BYTES_MAX)
                    .map_err(|e| failed(e.into()))?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(stream, decoder))
            }
            "lz4" => Box::new(lz4_flex::frame::FrameDecoder::new(stream)),
            name => {
                return Err(Error::user(format!(
                    "unknown compression '{name}': expected none, xz, zstd, bzip2, gzip, br, lzip, lzma or lz4"
                )));
            }
        },
    };
    Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, reader)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn compress(compression: &Compression, data: &[u8]) -> Vec<u8> {
        match compression {
            Compression::None => data.to_vec(),
            Compression::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Zstd => zstd::encode_all(data, 1).unwrap(),
            Compression::Bzip2 => {
                let mut encoder =
                    bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Gzip => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Brotli => {
                let mut out = Vec::new();
                {
                    let mut encoder = brotli::CompressorWriter::new(&mut out, 4096, 1, 20);
                    encoder.write_all(data).unwrap();
                }
                out
            }
            other => panic!("{other:?}"),
        }
    }

    const ALL: [Compression; 6] = [
        Compression::None,
        Compression::Xz,
        Compression::Zstd,
        Compression::Bzip2,
        Compression::Gzip,
        Compression::Brotli,
    ];

    fn unpack(compression: &Compression, data: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(data, compression)
            .unwrap()
            .read_to_end(&mut out)
            .map(|_| out)
    }

    #[test]
    fn every_compression_and_members_after_each_other() {
        let data: Vec<u8> = (0..300_000_u32)
            .flat_map(|n| n.wrapping_mul(n).to_le_bytes())
            .collect();
        for compression in &ALL {
            let packed = compress(compression, &data);
            assert_eq!(unpack(compression, &packed).unwrap(), data);
            if !matches!(compression, Compression::Brotli) {
                let twice = [&packed[..], &packed[..]].concat();
                let expected = [&data[..], &data[..]].concat();
                assert_eq!(
                    unpack(compression, &twice).unwrap(),
                    expected,
                    "{compression:?}"
                );
            }
        }
    }

    #[test]
    fn a_cut_off_file_is_an_error() {
        let data: Vec<u8> = (0..300_000_u32)
            .flat_map(|n| n.wrapping_mul(n).to_le_bytes())
            .collect();
        for compression in &ALL[1..] {
            let packed = compress(compression, &data);
            for len in [packed.len() / 2, packed.len() - 1] {
                unpack(compression, &packed[..len]).unwrap_err();
            }
        }
    }

    #[test]
    fn an_unknown_compression_is_named() {
        let error = decompress(&[][..], &Compression::from_name("rot13"))
            .err()
            .unwrap();
        assert_eq!(
            error.to_string(),
            "unknown compression 'rot13': expected none, xz, zstd, bzip2, gzip, br, lzip, lzma or lz4"
        );
    }
}
