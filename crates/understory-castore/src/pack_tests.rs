use super::*;
use proptest::prelude::*;

fn any_kind() -> impl Strategy<Value = Kind> {
    (0_u32..5).prop_map(|bits| Kind::from_bits(bits).unwrap())
}

fn any_piece() -> impl Strategy<Value = Piece> {
    (any::<[u8; 32]>(), any_kind(), 1_u32..3000).prop_map(|(digest, kind, len)| Piece {
        digest: Digest(digest),
        kind,
        len,
    })
}

/// A raw frame of these pieces, its payload all sevens.
fn frame(pieces: &[Piece]) -> Vec<u8> {
    let raw_len = pieces.iter().map(|piece| piece.len).sum::<u32>();
    let mut frame = vec![0; frame_header_len(pieces.len())];
    frame.resize(frame.len() + raw_len as usize, 7);
    encode_frame_header(&mut frame, pieces, Codec::Raw, raw_len);
    frame
}

fn decode(frame: &[u8]) -> Result<Vec<Piece>, String> {
    let fixed = FrameHeader::decode(frame)?;
    let header = frame
        .get(..fixed.header_len())
        .ok_or_else(|| "cut".to_owned())?;
    let pieces = decode_frame_table(&fixed, header)?;
    let payload = frame
        .get(fixed.header_len()..fixed.frame_len())
        .ok_or_else(|| "cut".to_owned())?;
    check_payload(&fixed, payload)?;
    Ok(pieces)
}

/// The layout, byte by byte, as `docs/disk-format.md` draws it.
#[test]
fn a_frame_is_laid_out_as_documented() {
    let piece = Piece {
        digest: Digest([9; 32]),
        kind: Kind::Directory,
        len: 3,
    };
    let frame = frame(&[piece]);
    let mut expected = b"uFr1\0\0\0\0".to_vec();
    expected.extend([1, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend(xxh3_64(&[7; 3]).to_le_bytes());
    expected.extend([9; 32]);
    expected.extend([3, 0, 0, 0x20]);
    expected.extend(xxh3_64(&expected).to_le_bytes());
    expected.extend([7; 3]);
    assert_eq!(frame, expected);
    assert_eq!(decode(&frame).unwrap(), [piece]);
}

#[test]
fn a_pack_header_of_another_kind_is_refused() {
    let id = PackId([0xab; 16]);
    let good = encode_pack_header(id, PACK_VERSION);
    assert_eq!(check_pack_header(&good, id), Ok(()));
    let far = encode_pack_header(id, PACK_VERSION_FAR);
    assert_eq!(check_pack_header(&far, id), Ok(()));
    assert_eq!(
        PackId::from_file_name("abababababababababababababababab.pack"),
        Some(id)
    );
    assert_eq!(
        PackId::from_file_name("ABababababababababababababababab.pack"),
        None
    );
    let sealed = |change: &dyn Fn(&mut [u8])| {
        let mut header = good;
        change(&mut header);
        let checksum = xxh3_64(&header[..56]);
        header[56..].copy_from_slice(&checksum.to_le_bytes());
        check_pack_header(&header, id).unwrap_err()
    };
    assert_eq!(
        sealed(&|header| header[8] = 3),
        "expected pack version 1 or 2, found 3"
    );
    assert_eq!(
        sealed(&|header| header[40] = 1),
        "expected zero flags and reserved bytes"
    );
    assert!(sealed(&|header| header[16] = 1).starts_with("expected pack id abab"));
    assert!(check_pack_header(&good[..20], id).is_err());
}

#[test]
fn a_footer_finds_each_of_its_pieces() {
    let pieces: Vec<_> = (0..2000_u32)
        .map(|number| {
            let digest = Digest::of(&number.to_le_bytes());
            let location = Location::new(number * 7, 300, Kind::Data, number, 5);
            (Key::new(&digest, Class::Blob), location)
        })
        .collect();
    let footer = encode_footer(pieces.clone());
    let mut reversed = pieces.clone();
    reversed.reverse();
    assert_eq!(footer, encode_footer(reversed));
    assert_eq!(
        footer.len(),
        FOOTER_HEADER_BYTES + 2000 * FOOTER_ENTRY_BYTES
    );
    let trailer = Trailer {
        footer_offset: 64,
        pieces: 2000,
        footer_checksum: xxh3_64(&footer),
        ..Trailer::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pack");
    let mut bytes = vec![0; 64];
    bytes.extend(&footer);
    bytes.extend(trailer.encode());
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let footer = crate::index::Footer::map(&file, &path, &trailer).unwrap();
    assert!(footer.is_sound());
    for (key, location) in &pieces {
        assert_eq!(footer.find(key), Some(*location));
        let mut other = *key;
        other.0[15] ^= 1;
        assert_eq!(footer.find(&other), None);
    }
    assert_eq!(footer.entries().count(), 2000);
}

proptest! {
    #[test]
    fn locations_round_trip(
        frame_offset: u32, frame_len in 0_usize..1 << 27, kind in any_kind(),
        offset in 0_u32..1 << 18, len in 0_u32..1 << 26,
    ) {
        let location = Location::new(frame_offset, frame_len, kind, offset, len);
        prop_assert_eq!(Location::from_bytes(&location.to_bytes()), location);
        prop_assert_eq!(location.frame_offset(), frame_offset);
        prop_assert_eq!(location.kind(), Some(kind));
        prop_assert_eq!(location.offset(), offset);
        prop_assert_eq!(location.len(), len);
        let hint = location.frame_len_hint();
        prop_assert!(hint >= frame_len.min(0xffff * 256) && hint <= frame_len + 256);
        prop_assert!(!Location::is_far(offset));
    }

    #[test]
    fn far_locations_round_trip(
        frame_len in 0_usize..1 << 27, kind in any_kind(), offset in 1_u32 << 18..1 << 22, len in 0_u32..1 << 22,
    ) {
        let location = Location::new(7, frame_len, kind, offset, len);
        prop_assert!(Location::is_far(offset));
        prop_assert_eq!(Location::from_bytes(&location.to_bytes()), location);
        prop_assert_eq!(location.kind(), Some(kind));
        prop_assert_eq!((location.offset(), location.len()), (offset, len));
        let hint = location.frame_len_hint();
        prop_assert!(hint >= frame_len.min(0xffff * 256) && hint <= frame_len + 256);
    }

    #[test]
    fn frames_round_trip_and_each_flipped_bit_is_found(
        pieces in proptest::collection::vec(any_piece(), 1..30), at: prop::sample::Index, bit in 0..8,
    ) {
        let mut frame = frame(&pieces);
        prop_assert_eq!(decode(&frame).unwrap(), pieces);
        let at = at.index(frame.len());
        prop_assert!(decode(&frame[..at]).is_err());
        frame[at] ^= 1_u8 << bit;
        prop_assert!(decode(&frame).is_err());
    }

    #[test]
    fn any_bytes_are_safe(mut bytes: Vec<u8>, frame_like: bool) {
        if frame_like && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&FRAME_MAGIC);
        }
        let _ = decode(&bytes);
        let _ = Trailer::decode(&bytes, bytes.len() as u64);
        let _ = check_pack_header(&bytes, PackId([0; 16]));
    }

    #[test]
    fn trailers_round_trip_and_each_flipped_bit_is_found(
        footer_offset in 64_u64..1 << 40, pieces in 0_u32..1 << 20, raw_bytes: u64,
        at in 0..TRAILER_BYTES, bit in 0..8,
    ) {
        let trailer = Trailer { footer_offset, pieces, raw_bytes, frames: 3, ..Trailer::default() };
        let len = footer_offset + trailer.footer_len() as u64 + TRAILER_BYTES as u64;
        let mut bytes = trailer.encode();
        prop_assert_eq!(Trailer::decode(&bytes, len), Some(trailer));
        prop_assert_eq!(Trailer::decode(&bytes, len + 1), None);
        bytes[at] ^= 1_u8 << bit;
        prop_assert_eq!(Trailer::decode(&bytes, len), None);
    }
}
