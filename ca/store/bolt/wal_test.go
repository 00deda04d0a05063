package bolt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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
	image := append(walHead(walID{1}), make([]byte, testArea.file()-walBlock)...)
	return &disk{durable: image, written: bytes.Clone(image), rand: rand}
}

func (d *disk) ReadAt(p []byte, at int64) (int, error) {
	n := copy(p, d.written[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
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

// TestLogModel holds log and bucket to a list, over failing disks and failing power: what was acknowledged is there, in its
// order, and of what was not, at most the last group.
func TestLogModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		d := newDisk(rand.New(rand.NewPCG(seed, seed)))
		db, err := bbolt.Open(filepath.Join(t.TempDir(), "meshca.db"), 0o600, &bbolt.Options{NoSync: true})
		check := func(err error) {
			rt.Helper()
			if err != nil {
				rt.Fatal(err)
			}
		}
		check(err)
		defer db.Close()
		check(db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket(bucketLedger); return err }))
		var (
			model []group
			// doubts were refused, and one may be there if the power fails next.
			doubts []group
			// fails says that an error is due.
			fails bool
		)
		start := func() *appender {
			return &appender{db: db, log: &wal{file: d, size: testArea}, later: time.AfterFunc(time.Hour, func() {}), last: sequence(rt, db)}
		}
		a := start()
		last := func() uint64 {
			if len(model) == 0 {
				return 0
			}
			return model[len(model)-1].last
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				n := rapid.IntRange(1, 3).Draw(rt, "entries")
				value := bytes.Repeat([]byte{byte(len(model) + 1)}, rapid.SampledFrom([]int{1, 3000, walBlock - walHeader, walBlock, int(testArea) / 3, int(testArea) - walHeader, int(testArea)}).Draw(rt, "size"))
				g := group{last() + 1, last() + uint64(n), value}
				err := a.append(value, n)
				if err == nil {
					model, doubts = append(model, g), nil
				} else if doubts = append(doubts, g); !fails {
					rt.Fatal(err)
				}
				fails = d.failWrite || d.failSync
			},
			"fold":       func(*rapid.T) { check(a.fold()) },
			"fail write": func(*rapid.T) { d.failWrite, fails = true, true },
			"fail sync":  func(*rapid.T) { d.failSync, fails = true, true },
			"power": func(*rapid.T) {
				d.fail()
				groups, err := readLog(d, testArea, sequence(rt, db))
				check(err)
				check(a.store(groups))
				if len(groups) > 0 && groups[len(groups)-1].first > last() {
					g := groups[len(groups)-1]
					if !slices.ContainsFunc(doubts, func(d group) bool { return sameGroup(d, g) }) {
						rt.Fatalf("nobody has appended %s", spans([]group{g}))
					}
					model = append(model, g)
				}
				doubts, fails = nil, false
				a = start()
				check(a.log.reset())
			},
			"": func(rt *rapid.T) {
				young, end := a.young()
				if have := slices.Concat(stored(rt, db), young); end != last() || !slices.EqualFunc(have, model, sameGroup) {
					rt.Fatalf("up to %d there are %s, and should be up to %d %s", end, spans(have), last(), spans(model))
				}
			},
		})
	})
}

func sameGroup(a, b group) bool {
	return a.first == b.first && a.last == b.last && bytes.Equal(a.value, b.value)
}

func spans(groups []group) (s string) {
	for _, g := range groups {
		s += fmt.Sprintf("[%d-%d %d*%x]", g.first, g.last, len(g.value), g.value[:1])
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
		"one amid them is damaged":      {disk: at(older, newer), damage: testArea.start(0) + walBlock + walHeader, err: ErrLog},
		"a damaged one was folded":      {disk: at(older, newer), damage: testArea.start(0) + walBlock + walHeader, folded: 3, want: newer},
		"of later times":                {disk: at(newer), folded: 1, err: ErrLog},
		"a length beyond the area":      {disk: at(older, newer), damage: testArea.start(1) + walBlock + 4, want: slices.Concat(older, newer[:1])},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.damage > 0 {
				tt.disk.written[tt.damage] ^= 0x80
			}
			got, err := readLog(tt.disk, testArea, tt.folded)
			if !errors.Is(err, tt.err) || !slices.EqualFunc(got, tt.want, sameGroup) {
				t.Errorf("%s, %v; want %s, %v", spans(got), err, spans(tt.want), tt.err)
			}
		})
	}
}
