//! What a snapshot of the metrics asks of an open store: its castore's counters and caches.

use super::Inner;
use crate::metrics::{Snapshot, Source};

impl Source for Inner {
    fn collect(&self, out: &mut Snapshot) {
        let castore = self.castore.counters();
        let writer = castore.writer;
        let counters = [
            (
                "understory_frame_cache_hits_total",
                "Frames of packs that were in memory when they were needed.",
                castore.frame_hits,
            ),
            (
                "understory_frame_cache_misses_total",
                "Frames that were read and decompressed.",
                castore.frame_misses,
            ),
            (
                "understory_directory_cache_hits_total",
                "Directories that were in memory when they were needed.",
                castore.directory_hits,
            ),
            (
                "understory_directory_cache_misses_total",
                "Directories that were read and decoded.",
                castore.directory_misses,
            ),
            (
                "understory_castore_read_bytes_total",
                "Bytes of frames read from packs.",
                castore.read_bytes,
            ),
            (
                "understory_castore_decompressed_bytes_total",
                "Bytes that these frames hold.",
                castore.decompressed_bytes,
            ),
            (
                "understory_castore_damaged_frames_total",
                "Frames that were found damaged.",
                castore.damaged_frames,
            ),
            (
                "understory_added_bytes_total",
                "Bytes of files that were given to the castore.",
                writer.given_bytes,
            ),
            (
                "understory_added_masked_files_total",
                "Files whose hash parts of store paths were masked.",
                writer.masked_files,
            ),
            (
                "understory_added_new_bytes_total",
                "Bytes of these that were new, with directories and chunk lists, before compression.",
                writer.new_bytes,
            ),
            (
                "understory_added_stored_bytes_total",
                "Bytes that were appended to packs for them.",
                writer.stored_bytes,
            ),
        ];
        for (name, help, value) in counters {
            out.counter(name, help, &[], value);
        }
        for (cause, bytes) in [
            ("file", writer.file_duplicate_bytes),
            ("chunk", writer.chunk_duplicate_bytes),
            ("mask", writer.masked_duplicate_bytes),
        ] {
            out.counter(
                "understory_added_duplicate_bytes_total",
                "Bytes of files that were given and were stored already: in a file that is equal as a whole, in an equal chunk, or in one that is equal but for hash parts of store paths.",
                &[("cause", cause)],
                bytes,
            );
        }
        let gauges = [
            (
                "understory_frame_cache_bytes",
                "Memory that decompressed frames take.",
                castore.frame_cache_bytes,
            ),
            (
                "understory_directory_cache_bytes",
                "Memory that decoded directories take.",
                castore.directory_cache_bytes,
            ),
            (
                "understory_path_info_cache_bytes",
                "Memory that path infos take.",
                self.rows.weight(),
            ),
        ];
        for (name, help, value) in gauges {
            out.gauge(name, help, &[], value);
        }
    }
}
