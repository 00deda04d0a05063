package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

const (
	sector = 512
	// testArea makes the areas change places often.
	testArea areaSize = 8 * walBlock
)

// disk is a file whose power can fail: what was not synced is there, or not, or in part, sector by sector.
type disk struct {
	durable, written []byte
	// failWrite and failSync have the next one fail, after which the system knows no better than anybody what is durable.
	failWrite, failSync bool
	rand                *rand.Rand
}

var errDisk = errors.New("input/output error")

func newDisk(rand *rand.Rand) *disk {
	image := append(walHead{}.block(), make([]byte, testArea.file()-walBlock)...)
	return &disk{durable: image, written: bytes.Clone(image), rand: rand}
}

func (d *disk) ReadAt(p []byte, at int64) (int, error) {
	n := copy(p, d.written[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *disk) WriteDurably(p []byte, at int64) error {
	if _, err := d.WriteAt(p, at); err != nil {
		return err
	}
	return d.Sync()
}

func (d *disk) WriteAt(p []byte, at int64) (int, error) {
	if int(at)+len(p) > len(d.written) {
		return 0, fmt.Errorf("%d bytes at %d are beyond the end", len(p), at)
	}
	if at%walBlock != 0 || len(p)%walBlock != 0 {
		return 0, fmt.Errorf("%d bytes at %d: a block with another record in it would be written again", len(p), at)
	}
	n := len(p)
	if d.failWrite {
		n = d.rand.IntN(n)
	}
	copy(d.written[at:], p[:n])
	if d.failWrite {
		d.failWrite = false
		return n, errDisk
	}
	return n, nil
}

func (d *disk) Sync() error {
	if d.failSync {
		d.failSync = false
		d.settle() // some of it is durable, and a later sync will not say which
		return errDisk
	}
	copy(d.durable, d.written)
	return nil
}

func (d *disk) Close() error { return nil }

func (d *disk) Stat() (os.FileInfo, error) { return nil, errors.ErrUnsupported }

// settle makes a part of what was written durable.
func (d *disk) settle() {
	all := d.rand.IntN(4) == 0
	for at := 0; at < len(d.durable); at += sector {
		if all || d.rand.IntN(2) == 0 {
			copy(d.durable[at:at+sector], d.written[at:])
		}
	}
}

// fail is the power's.
func (d *disk) fail() {
	d.settle()
	d.written = bytes.Clone(d.durable)
	d.failWrite, d.failSync = false, false
}

// TestLogModel holds log and bucket to a list, over disks that fail, commits that fail at their end, and power that fails:
// what was acknowledged is there, once, and what else is there was refused.
func TestLogModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		m := &logModel{rt: rt, path: filepath.Join(t.TempDir(), "meshca.db"), rand: rand.New(rand.NewPCG(seed, seed)), acked: map[uint64]group{}}
		m.disk = newDisk(m.rand)
		m.open()
		defer func() { _ = m.db.Close() }()
		m.check(m.db.Update(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket(bucketLedger)
			_, err2 := tx.CreateBucket(bucketMeta)
			return errors.Join(err, err2)
		}))
		m.start()
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				m.append(rapid.IntRange(1, 3).Draw(rt, "entries"), rapid.SampledFrom([]int{
					4, 3000, walBlock - walHeader, walBlock, int(testArea) / 3, int(testArea) - walHeader, int(testArea)}).Draw(rt, "size"))
			},
			"fold":        func(*rapid.T) { m.due(m.a.fold()) },
			"probe":       func(*rapid.T) { m.due(m.a.probe()) },
			"fail write":  func(*rapid.T) { m.disk.failWrite = true },
			"fail sync":   func(*rapid.T) { m.disk.failSync = true },
			"fail commit": func(*rapid.T) { m.failCommit = true },
			"fail renew":  func(*rapid.T) { m.failRenew = true },
			"power":       func(*rapid.T) { m.power() },
			"":            func(*rapid.T) { m.compare() },
		})
	})
}

type logModel struct {
	rt   *rapid.T
	path string
	rand *rand.Rand
	disk *disk
	base uint64 // of the log on the disk
	db   *bbolt.DB
	a    *appender

	failCommit, failRenew bool
	// metas is what the disk may have still of bbolt's first two pages.
	metas []byte

	acked   map[uint64]group
	refused [][]byte
	made    uint32
}

func (m *logModel) check(err error) {
	m.rt.Helper()
	if err != nil {
		m.rt.Fatal(err)
	}
}

// due lets an error be that was asked for.
func (m *logModel) due(err error) {
	m.rt.Helper()
	if err != nil && !errors.Is(err, errDisk) {
		m.rt.Fatal(err)
	}
}

func (m *logModel) open() {
	db, err := bbolt.Open(m.path, 0o600, &bbolt.Options{NoSync: true})
	m.check(err)
	m.db = db
}

// start is Open's part.
func (m *logModel) start() {
	last := sequence(m.rt, m.db)
	if m.base > last {
		m.rt.Fatalf("the log begins behind entry %d, the bucket ends at %d", m.base, last)
	}
	groups, _, err := readLog(m.disk, testArea, last)
	m.check(err)
	if n := len(groups); n > 0 {
		last = groups[n-1].last
	}
	writes := &committer{db: m.db, file: m, commit: m.update}
	m.a = &appender{db: m.db, update: writes.update, renew: m.renew, log: &wal{torn: true}, later: time.AfterFunc(time.Hour, func() {}), pending: groups, last: last}
	m.due(m.a.mend())
}

// update fails at its end if it is to: it can be seen, and may not be durable.
func (m *logModel) update(fn func(*bbolt.Tx) error) error {
	if m.metas != nil { // this one writes over what the disk's state rests on
		m.rt.Fatal("a commit begins while nobody knows whether the one before is durable")
	}
	if !m.failCommit {
		return m.db.Update(fn)
	}
	m.failCommit = false
	metas := make([]byte, 2*m.db.Info().PageSize)
	f, err := os.Open(m.path)
	m.check(err)
	defer f.Close()
	_, err = f.ReadAt(metas, 0)
	m.check(err)
	if err := m.db.Update(fn); err != nil {
		return err
	}
	m.metas = metas
	return errDisk
}

// ReadAt and WriteDurably are bbolt's file for the committer.
func (m *logModel) ReadAt(p []byte, at int64) (int, error) {
	f, err := os.Open(m.path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.ReadAt(p, at)
}

func (m *logModel) WriteDurably(p []byte, at int64) error {
	now := make([]byte, 2*len(p))
	_, err := m.ReadAt(now, 0)
	m.check(err)
	if !bytes.Equal(now[at:at+int64(len(p))], p) {
		m.rt.Fatalf("page %d is written, with other content than it has", at/int64(len(p)))
	}
	if m.metas != nil && bytes.Equal(m.metas[at:at+int64(len(p))], p) {
		m.rt.Fatal("the page of the state before is written again, not that of the one that is shown")
	}
	if m.failCommit {
		m.failCommit = false
		return errDisk
	}
	m.metas = nil
	return nil
}

func (m *logModel) renew(base uint64) (*wal, error) {
	if m.failRenew {
		m.failRenew = false
		return nil, errDisk
	}
	m.disk, m.base = newDisk(m.rand), base
	return &wal{file: m.disk, size: testArea}, nil
}

func (m *logModel) append(n, size int) {
	m.made++
	value := bytes.Repeat(binary.BigEndian.AppendUint32(nil, m.made), size/4)
	if err := m.a.append(value, n); err != nil {
		m.due(err)
		m.refused = append(m.refused, value)
		return
	}
	g := group{m.a.last - uint64(n) + 1, m.a.last, value}
	if old, twice := m.acked[g.first]; twice {
		m.rt.Fatalf("index %d was given to %s and to %s", g.first, spans([]group{old}), spans([]group{g}))
	}
	m.acked[g.first] = g
}

// power fails.
func (m *logModel) power() {
	m.disk.fail()
	m.failCommit, m.failRenew = false, false
	m.check(m.db.Close())
	if m.metas != nil && m.rand.IntN(2) == 0 {
		f, err := os.OpenFile(m.path, os.O_RDWR, 0)
		m.check(err)
		_, err = f.WriteAt(m.metas, 0)
		m.check(errors.Join(err, f.Close()))
	}
	m.metas = nil
	m.open()
	m.start()
}

func (m *logModel) compare() {
	all := stored(m.rt, m.db)
	young, _ := m.a.unfolded()
	for _, g := range young {
		if len(all) == 0 || g.first > all[len(all)-1].last { // a commit that failed at its end has brought it
			all = append(all, g)
		}
	}
	last, found := uint64(0), 0
	for _, g := range all {
		if g.first != last+1 {
			m.rt.Fatalf("there is a gap: %s", spans(all))
		}
		last = g.last
		if sameGroup(m.acked[g.first], g) {
			found++
		} else if !slices.ContainsFunc(m.refused, func(v []byte) bool { return bytes.Equal(v, g.value) }) {
			m.rt.Fatalf("nobody has appended %s", spans([]group{g}))
		}
	}
	if found != len(m.acked) {
		m.rt.Fatalf("%d groups were acknowledged, %d are there: %s", len(m.acked), found, spans(all))
	}
}

func sameGroup(a, b group) bool {
	return a.first == b.first && a.last == b.last && bytes.Equal(a.value, b.value)
}

func spans(groups []group) (s string) {
	for _, g := range groups {
		s += fmt.Sprintf("[%d-%d %d*%x]", g.first, g.last, len(g.value), g.value[:4])
	}
	return s
}

func sequence(t interface{ Fatal(...any) }, db *bbolt.DB) (last uint64) {
	if err := db.View(func(tx *bbolt.Tx) error { last = tx.Bucket(bucketLedger).Sequence(); return nil }); err != nil {
		t.Fatal(err)
	}
	return last
}

// stored are the groups in the bucket.
func stored(t interface{ Fatal(...any) }, db *bbolt.DB) (all []group) {
	err := db.View(func(tx *bbolt.Tx) error {
		end := tx.Bucket(bucketLedger).Sequence()
		c := tx.Bucket(bucketLedger).Cursor()
		for k, v := c.Last(); k != nil; k, v = c.Prev() {
			first := indexOf(k)
			all = append(all, group{first, end, bytes.Clone(v)})
			end = first - 1
		}
		slices.Reverse(all)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// What a log holds is whatever a disk gives back: it is read within its bounds, and says nothing that is no record.
func FuzzReadArea(f *testing.F) {
	one := appendRecord(nil, group{7, 9, []byte("value")})
	f.Add(one)
	f.Add(appendRecord(one, group{10, 10, bytes.Repeat([]byte{1}, walBlock)}))
	f.Add(appendRecord(one, group{3, 4, nil}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var again []byte
		var last uint64
		for i, g := range readArea(b) {
			if g.first == 0 || g.last < g.first || i > 0 && g.first != last+1 {
				t.Fatalf("a group of %d to %d behind %d", g.first, g.last, last)
			}
			last = g.last
			again = appendRecord(again, g)
		}
		// The last record's padding need not be there.
		if n := min(len(again), len(b)); len(again)-n >= walBlock {
			t.Fatalf("%d bytes make records of %d", len(b), len(again))
		}
	})
}

func TestReadLogMissesNothing(t *testing.T) {
	value := bytes.Repeat([]byte{1}, 100)
	at := func(areas ...[]group) *disk {
		d := newDisk(nil)
		for i, groups := range areas {
			var b []byte
			for _, g := range groups {
				b = appendRecord(b, g)
			}
			copy(d.written[testArea.start(i):], b)
		}
		return d
	}
	older, newer := []group{{1, 2, value}, {3, 3, value}}, []group{{4, 6, value}, {7, 7, value}}
	for name, tt := range map[string]struct {
		disk   *disk
		damage int64
		folded uint64
		want   []group
		err    error
	}{
		"all":                           {disk: at(older, newer), want: slices.Concat(older, newer)},
		"the other way round":           {disk: at(newer, older), want: slices.Concat(older, newer)},
		"a part is folded":              {disk: at(older, newer), folded: 3, want: newer},
		"folded in the midst of a turn": {disk: at(older, newer), folded: 6, want: newer[1:]},
		"all is folded":                 {disk: at(older, newer), folded: 7},
		"nothing":                       {disk: at()},
		"the last one is torn":          {disk: at(older, newer), damage: testArea.start(1) + walBlock + walHeader + 50, want: slices.Concat(older, newer[:1])},
		"the first one is damaged":      {disk: at(older, newer), damage: testArea.start(0) + 3, err: ErrLog},
		"one amid them is damaged":      {disk: at(older, newer), damage: testArea.start(0) + walBlock + walHeader, want: older[:1], err: ErrLog},
		"a damaged one was folded":      {disk: at(older, newer), damage: testArea.start(0) + walBlock + walHeader, folded: 3, want: newer},
		"of later times":                {disk: at(newer), folded: 1, err: ErrLog},
		"damaged before others":         {disk: at(nil, newer), damage: testArea.start(1) + walHeader, folded: 3, err: ErrLog},
		"what comes before the gap":     {disk: at(older, slices.Concat(newer, []group{{8, 8, value}})), damage: testArea.start(1) + walBlock + walHeader, want: slices.Concat(older, newer[:1]), err: ErrLog},
		"a length beyond the area":      {disk: at(older, newer), damage: testArea.start(1) + walBlock + 4, want: slices.Concat(older, newer[:1])},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.damage > 0 {
				tt.disk.written[tt.damage] ^= 0x80
			}
			got, _, err := readLog(tt.disk, testArea, tt.folded)
			if !errors.Is(err, tt.err) || !slices.EqualFunc(got, tt.want, sameGroup) {
				t.Errorf("%s, %v; want %s, %v", spans(got), err, spans(tt.want), tt.err)
			}
		})
	}
}
