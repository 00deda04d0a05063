package bolt

import (
	"bytes"
	"cmp"
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
// some ten writes; a group goes into the log with one of each, into blocks that were written before, so that on most file
// systems no metadata takes part. Layout, all numbers big-endian:
//
//	one block   the head: "meshca-wal 1\n", three bytes of zero, the log's ID and that of the one before it (16 bytes each),
//	            uint64 the index of the last entry before the log's first, CRC-32C of these
//	two areas   records, one behind the other, each from the beginning of a block on:
//	            uint32  CRC-32C of the record's other bytes
//	            uint32  length of the value
//	            uint64  index of the first entry
//	            uint64  index of the last entry
//	            value   the group, as the ledger's bucket has it
//
// While one area is written to, what the other one holds is folded into the bucket; then they change places. Nothing is
// taken out of an area: what an earlier turn has left is told by its indexes, which only grow while a log is used. A log
// that was not written to its end, or not by this process, is not used on: a new one takes its place.
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

// walID tells one log from another: each start begins one.
type walID [walIDSize]byte

// group is a value of the ledger's bucket, and the indexes of its first and last entry.
type group struct {
	first, last uint64
	value       []byte
}

// walFile is a file of a fixed size.
type walFile interface {
	io.ReaderAt
	// WriteDurably writes whole blocks. It returns nil when they are durable; of metadata need be only what is needed to read
	// them again.
	WriteDurably(p []byte, at int64) error
	Stat() (os.FileInfo, error)
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

// overwrites is the index up to which all must have been folded before the areas change places.
func (w *wal) overwrites() uint64 { return w.ends[1-w.area] }

// turn changes the areas' places.
func (w *wal) turn() { w.area, w.offset = 1-w.area, 0 }

// append makes a group durable. After an error nothing can be appended: the log is torn.
func (w *wal) append(g group) error {
	w.record = appendRecord(w.record[:0], g)
	w.torn = true
	if err := w.file.WriteDurably(w.record, w.size.start(w.area)+int64(w.offset)); err != nil {
		return err
	}
	// gofail: var ledgerDurable struct{}

	w.torn = false
	w.ends[w.area] = g.last
	w.offset += len(w.record)
	return nil
}

// probe writes and syncs where the next record goes, if there is room.
func (w *wal) probe() error {
	if w.offset+walBlock > int(w.size) {
		return nil
	}
	w.torn = true
	if err := w.file.WriteDurably(make([]byte, walBlock), w.size.start(w.area)+int64(w.offset)); err != nil {
		return err
	}
	w.torn = false
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

// readLog returns the groups behind the index folded, in order, as far as there is no gap. A record that was not written to
// its end is not there: nobody was told that it is. Where one is missing that others follow, it says so, too (ErrLog). end is
// the index of the last entry that the log has, folded or not.
func readLog(f io.ReaderAt, size areaSize, folded uint64) (all []group, end uint64, err error) {
	var areas [walAreas][]byte
	for i := range areas {
		areas[i] = make([]byte, size)
		if _, err := f.ReadAt(areas[i], size.start(i)); err != nil {
			return nil, 0, err
		}
		all = append(all, readArea(areas[i])...)
	}
	slices.SortFunc(all, func(a, b group) int { return cmp.Compare(a.first, b.first) })
	if n := len(all); n > 0 {
		end = all[n-1].last
	}
	all = slices.DeleteFunc(all, func(g group) bool { return g.last <= folded })
	last := folded
	for i, g := range all {
		if g.first != last+1 {
			return all[:i], end, fmt.Errorf("%w: entry %d is followed by entry %d", ErrLog, last, g.first)
		}
		last = g.last
	}
	// What is damaged ends an area like what was not written. But nothing was written behind that.
	for _, area := range areas {
		for ; len(area) > 0; area = area[walBlock:] {
			if g, ok := readRecord(area); ok && g.first > last {
				return all, end, fmt.Errorf("%w: entry %d is followed by entry %d", ErrLog, last, g.first)
			}
		}
	}
	return all, end, nil
}

// countBehind is how many entries behind an index can be read in a log, whatever is missing before them.
func countBehind(f io.ReaderAt, size areaSize, last uint64) (n uint64) {
	for i := range walAreas {
		area := make([]byte, size)
		if _, err := f.ReadAt(area, size.start(i)); err != nil {
			continue
		}
		for ; len(area) > 0; area = area[walBlock:] {
			if g, ok := readRecord(area); ok && g.first > last {
				n += g.last - g.first + 1
			}
		}
	}
	return n
}

// walHead says which log it is, behind which other, and where it begins.
type walHead struct {
	id, prev walID
	// base is the index of the last entry before the log.
	base uint64
}

// block is the log's first.
func (h walHead) block() []byte {
	b := append(make([]byte, 0, walBlock), walMagic...)
	b = append(append(b, h.id[:]...), h.prev[:]...)
	b = binary.BigEndian.AppendUint64(b, h.base)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return b[:walBlock]
}

// readHead reads a log's head, and reports whether it is one.
func readHead(f io.ReaderAt) (h walHead, ok bool) {
	b := make([]byte, walBlock)
	if _, err := f.ReadAt(b, 0); err != nil {
		return h, false
	}
	rest := b[len(walMagic):]
	copy(h.id[:], rest)
	copy(h.prev[:], rest[walIDSize:])
	h.base = binary.BigEndian.Uint64(rest[2*walIDSize:])
	const size = len(walMagic) + 2*walIDSize + 8 + 4
	return h, bytes.Equal(b[:size], h.block()[:size])
}

// createLog makes an empty log in the place of what has that name. That it does is durable when its directory has been synced.
func createLog(path string, head walHead) (walFile, error) {
	next := path + ".new"
	if err := gone(os.Remove(next)); err != nil { // its mode would stay
		return nil, err
	}
	f, err := os.OpenFile(next, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	// The zeros are written, not left out: what a file lacks the file system would have to allot in the midst of a commit.
	_, err = f.Write(append(head.block(), make([]byte, walArea.file()-walBlock)...))
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = lockFile(f)
	}
	var file walFile = dataFile{f}
	if err == nil {
		if async, err := openAsync(f); err == nil {
			file = async
		}
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making a log for the ledger, of %d MiB: %w", walArea.file()>>20, err), file.Close(), gone(os.Remove(f.Name())))
	}
	return file, nil
}

// lockFile sees to it that one process has the file: what locks the store is another file.
func lockFile(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: its log %s is locked. Stop the other meshca that uses it (`fuser %s` names it)", ErrInUse, f.Name(), f.Name())
	}
	return err
}

// dataFile writes as every system can.
type dataFile struct{ *os.File }

// WriteDurably implements walFile.
func (f dataFile) WriteDurably(p []byte, at int64) error {
	if _, err := f.WriteAt(p, at); err != nil {
		return err
	}
	return f.sync()
}
