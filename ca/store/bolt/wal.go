package bolt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// The ledger's write-ahead log is a file of fixed size beside the store's. bbolt makes a commit durable with two syncs and
// some ten writes; a group goes into the log with one of each, into blocks that were written before, so that no metadata
// of the file system takes part. Layout, all numbers big-endian:
//
//	one block   "meshca-wal 1\n", three bytes of zero, the log's ID (16 bytes), CRC-32C of these
//	two areas   records, one behind the other, each from the beginning of a block on:
//	            uint32  CRC-32C of the record's other bytes
//	            uint32  length of the value
//	            uint64  index of the first entry
//	            uint64  index of the last entry
//	            value   the group, as the ledger's bucket has it
//
// While one area is written to, what the other one holds is folded into the bucket; then they change places. Nothing is
// ever taken out of an area: what is folded already, and what an earlier turn has left, is told by its indexes, which only
// grow.
const (
	walSuffix = ".wal"
	walMagic  = "meshca-wal 1\n\x00\x00\x00"
	walIDSize = 16
	walBlock  = 4096
	walAreas  = 2
	// walHeader is the size of a record without its value.
	walHeader = 4 + 4 + 8 + 8
)

// areaSize is that of a log's areas, in bytes.
type areaSize int

// walArea holds what is issued in about half a second at most.
const walArea areaSize = 1 << 20

// start is where an area begins.
func (s areaSize) start(area int) int64 { return walBlock + int64(area)*int64(s) }

// file is the log's size.
func (s areaSize) file() int64 { return s.start(walAreas) }

// ErrLog is wrapped by Open's error where the ledger's log does not hold what it should.
var ErrLog = errors.New("the ledger's log is not whole")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// walID says which store a log is of.
type walID [walIDSize]byte

// group is a value of the ledger's bucket, and the indexes of its first and last entry.
type group struct {
	first, last uint64
	value       []byte
}

// walFile is a file whose Sync makes durable what was written into it, but no metadata.
type walFile interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Close() error
}

// wal writes the log. It serves one goroutine at a time.
type wal struct {
	file walFile
	size areaSize
	// area is the one that is written to, from offset on.
	area   int
	offset int
	// ends are the indexes of the last entries in each area.
	ends [walAreas]uint64
	// torn says that the last write has failed, and nobody knows what it has left.
	torn   bool
	record []byte
}

// recordSize is what a value takes in the log, in bytes.
func recordSize(value []byte) int {
	return (walHeader + len(value) + walBlock - 1) / walBlock * walBlock
}

// holds says whether an area has room for a group.
func (w *wal) holds(g group) bool { return recordSize(g.value) <= int(w.size) }

// fits says whether the area that is written to has room.
func (w *wal) fits(g group) bool { return w.offset+recordSize(g.value) <= int(w.size) }

// next is the index up to which all must have been folded before the areas change places.
func (w *wal) next() uint64 { return w.ends[1-w.area] }

// turn changes the areas' places.
func (w *wal) turn() { w.area, w.offset = 1-w.area, 0 }

// append makes a group durable. After an error nothing can be appended before reset.
func (w *wal) append(g group) error {
	w.record = appendRecord(w.record[:0], g)
	w.torn = true
	if _, err := w.file.WriteAt(w.record, w.size.start(w.area)+int64(w.offset)); err != nil {
		return err
	}
	// gofail: var ledgerWritten struct{}

	if err := w.file.Sync(); err != nil {
		return err
	}
	// gofail: var ledgerDurable struct{}

	w.torn = false
	w.ends[w.area] = g.last
	w.offset += len(w.record)
	return nil
}

// reset empties the log, of which all must have been folded.
func (w *wal) reset() error {
	w.torn = true
	for area := range walAreas {
		if _, err := w.file.WriteAt(make([]byte, walBlock), w.size.start(area)); err != nil {
			return err
		}
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	*w = wal{file: w.file, size: w.size, record: w.record}
	return nil
}

// appendRecord adds a group's record, in whole blocks: a block that another record lies in is never written again.
func appendRecord(b []byte, g group) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(g.value)))
	b = binary.BigEndian.AppendUint64(b, g.first)
	b = binary.BigEndian.AppendUint64(b, g.last)
	b = append(b, g.value...)
	binary.BigEndian.PutUint32(b[start:], crc32.Checksum(b[start+4:], castagnoli))
	return append(b, make([]byte, start+recordSize(g.value)-len(b))...)
}

// readRecord reads the record that b begins with, and reports whether there is a whole one. The value is part of b.
func readRecord(b []byte) (group, bool) {
	if len(b) < walHeader {
		return group{}, false
	}
	size := uint64(binary.BigEndian.Uint32(b[4:]))
	g := group{first: binary.BigEndian.Uint64(b[8:]), last: binary.BigEndian.Uint64(b[16:])}
	if size > uint64(len(b)-walHeader) || g.first == 0 || g.last < g.first {
		return group{}, false
	}
	end := walHeader + int(size)
	if crc32.Checksum(b[4:end], castagnoli) != binary.BigEndian.Uint32(b) {
		return group{}, false
	}
	g.value = b[walHeader:end]
	return g, true
}

// readArea reads the records that were written in one turn: those behind them, of an earlier one, have lower indexes.
func readArea(b []byte) (all []group) {
	for offset := 0; offset < len(b); {
		g, ok := readRecord(b[offset:])
		if !ok || len(all) > 0 && g.first != all[len(all)-1].last+1 {
			return all
		}
		all = append(all, g)
		offset += recordSize(g.value)
	}
	return all
}

// readLog returns the groups behind the index folded, in order. A record that was not written to its end is not there: no
// one was told that it is. Where one is missing that others follow, it says so (ErrLog).
func readLog(f io.ReaderAt, size areaSize, folded uint64) ([]group, error) {
	var all []group
	for area := range walAreas {
		b := make([]byte, size)
		if _, err := f.ReadAt(b, size.start(area)); err != nil {
			return nil, err
		}
		all = append(all, readArea(b)...)
	}
	slices.SortFunc(all, func(a, b group) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	all = slices.DeleteFunc(all, func(g group) bool { return g.last <= folded })
	last := folded
	for _, g := range all {
		if g.first != last+1 {
			return nil, fmt.Errorf("%w: entry %d is followed by %d", ErrLog, last, g.first)
		}
		last = g.last
	}
	return all, nil
}

// walHead is the log's first block.
func walHead(id walID) []byte {
	b := append(append(make([]byte, 0, walBlock), walMagic...), id[:]...)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return b[:walBlock]
}

// readHead tells which store a log is of.
func readHead(f io.ReaderAt) (id walID, ok bool) {
	b := make([]byte, walBlock)
	if _, err := f.ReadAt(b, 0); err != nil {
		return id, false
	}
	copy(id[:], b[len(walMagic):])
	return id, slices.Equal(b, walHead(id))
}

// createLog makes an empty log in the place of what has that name.
func createLog(path string, id walID) error {
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(next) }() // it has another name by then, or is not wanted
	// The zeros are written, not left out: what a file lacks the file system would have to allot in the midst of a commit.
	_, err = f.Write(append(walHead(id), make([]byte, walArea.file()-walBlock)...))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// dataFile is a file of a fixed size.
type dataFile struct{ *os.File }

// Sync makes what was written durable; of metadata only what is needed to read it again (fdatasync(2)).
func (f dataFile) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return err
		}
	}
}
