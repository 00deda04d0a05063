package bolt

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

const td = "example.org"

func bundleOf(sequence uint64) ca.StoredBundle {
	return ca.StoredBundle{Sequence: sequence, JSON: fmt.Appendf(nil, `{"trust_domain":%q,"keys":[]}`, td)}
}

// decided is a store at a new place with a bundle, a rollout, a denial and some entries.
func decided(t *testing.T) (*Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	t.Cleanup(func() { _ = s.Close() })
	must(t, s.SwapBundle(t.Context(), 0, bundleOf(1)))
	must(t, s.SwapRollout(t.Context(), 0, rotation.Rollout{Step: rotation.StepOut}))
	must(t, s.PutDenial(t.Context(), ca.Denial{ID: "spiffe://example.org/thief", Why: "a test"}))
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "a", IssuedAt: time.Unix(1000, 0)}, {ID: "b", IssuedAt: time.Unix(2000, 0)}}))
	return s, path
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// backup is the whole of one.
func backup(t *testing.T, s *Store) []byte {
	t.Helper()
	snapshot, err := s.Backup(t.Context())
	must(t, err)
	data, err := io.ReadAll(snapshot)
	must(t, errors.Join(err, snapshot.Close()))
	if int64(len(data)) != snapshot.Bytes || sha256.Sum256(data) != snapshot.SHA256 {
		t.Fatalf("the backup has %d bytes, it says %d, or another digest than it says", len(data), snapshot.Bytes)
	}
	return data
}

func restore(t *testing.T, data []byte, path string, adjust ...func(*RestoreOptions)) (Restored, error) {
	t.Helper()
	o := RestoreOptions{Backup: bytes.NewReader(data), Path: path, TrustDomain: td}
	for _, a := range adjust {
		a(&o)
	}
	r, err := Restore(t.Context(), o)
	entries, dirErr := os.ReadDir(filepath.Dir(path))
	must(t, dirErr)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".meshca") {
			t.Errorf("%s was left behind", e.Name())
		}
	}
	return r, err
}

func replacing(o *RestoreOptions) { o.Replace = true }
func accepting(o *RestoreOptions) { o.Replace, o.AcceptRollback = true, true }

// Backups that are taken while groups come in hold whole groups, a prefix of all, and open as stores.
func TestBackupWhileItIsWritten(t *testing.T) {
	s, _ := decided(t)
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	defer writers.Wait()
	defer stop()
	for range 4 {
		writers.Go(func() {
			for ctx.Err() == nil {
				group := make([]ca.LedgerEntry, 7)
				for i := range group {
					group[i] = ca.LedgerEntry{ID: fmt.Sprint(i), Evidence: make([]byte, 700), IssuedAt: time.Now(), NotAfter: time.Now()}
				}
				if err := s.AppendLedger(context.Background(), group); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var last uint64
	for i := range 6 {
		data := backup(t, s)
		path := filepath.Join(t.TempDir(), "meshca.db")
		r, err := restore(t, data, path)
		must(t, err)
		if r.Header.LedgerLast < last {
			t.Errorf("backup %d ends at entry %d, the one before at %d", i, r.Header.LedgerLast, last)
		}
		last = r.Header.LedgerLast
		restored := opened(t, path)
		next := last
		must(t, restored.ScanLedger(t.Context(), func(e ca.LedgerEntry) (bool, error) {
			if e.Index != next {
				t.Fatalf("entry %d in the place of %d", e.Index, next)
			}
			next--
			return true, nil
		}))
		if next != 0 || (last-2)%7 != 0 {
			t.Errorf("of %d entries %d are missing, or a group was cut", last, next)
		}
		if d, err := restored.Denials(t.Context()); err != nil || len(d) != 1 {
			t.Errorf("%v, %v", d, err)
		}
		closed(t, restored)
	}
}

// A snapshot that nobody reads holds no transaction, and its file has no name.
func TestASlowReaderCostsTheStoreNothing(t *testing.T) {
	s, path := decided(t)
	snapshot, err := s.Backup(t.Context())
	must(t, err)
	defer snapshot.Close()
	if n := s.db.Stats().OpenTxN; n != 0 {
		t.Errorf("%d transactions are open", n)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 2 { // it, and its log
		t.Errorf("beside the store there is %v, %v", entries, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Backup(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("a backup that nobody wants: %v", err)
	}
}

func TestRestoredIsWhatWasBackedUp(t *testing.T) {
	s, _ := decided(t)
	data := backup(t, s)
	path := filepath.Join(t.TempDir(), "meshca.db")
	if _, err := restore(t, data, path, func(o *RestoreOptions) { o.DryRun = true }); err != nil || exists(path) {
		t.Fatalf("a dry run: %v, something is there: %v", err, exists(path))
	}
	r, err := restore(t, data, path)
	must(t, err)
	if h := r.Header; h.LedgerLast != 2 || h.LedgerEntries != 2 || !h.LastIssued.Equal(time.Unix(2000, 0)) || h.Denials != 1 || h.BundleSequence != 1 ||
		h.Generation != 3 || h.TrustDomain != td || h.Rollout != "out" || time.Since(h.Made) > time.Minute || r.Aside != "" || r.Behind != nil {
		t.Errorf("restored %+v", r)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	restored := opened(t, path)
	defer closed(t, restored)
	was, _ := s.Mark()
	if now, _ := restored.Mark(); now != was {
		t.Errorf("the mark was %+v, and is %+v", was, now)
	}
	a, err := s.History(t.Context())
	must(t, err)
	b, err := restored.History(t.Context())
	if err != nil || !bytes.Equal(a.MarkKey, b.MarkKey) {
		t.Errorf("the key of marks is another one: %v", err)
	}
	if !a.RestoredAt.IsZero() || time.Since(b.RestoredAt) > time.Minute {
		t.Errorf("one was restored at %v, the other at %v", a.RestoredAt, b.RestoredAt)
	}
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// resealed changes a backup and gives it the digest that it then has.
func resealed(data []byte, change func([]byte) []byte) []byte {
	body := change(bytes.Clone(data[:len(data)-sha256.Size]))
	sum := sha256.Sum256(body)
	return append(body, sum[:]...)
}

func TestWhatIsNoBackup(t *testing.T) {
	s, storePath := decided(t)
	data := backup(t, s)
	must(t, s.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, SchemaVersion+1))
	}))
	if _, err := s.Backup(t.Context()); !errors.Is(err, ErrSchema) {
		t.Errorf("a backup of a newer schema: %v", err)
	}
	store, err := os.ReadFile(storePath)
	must(t, err)
	flipped := bytes.Clone(data)
	flipped[len(flipped)/2] ^= 1
	// A page of the store is overwritten, and the digest made to fit.
	damaged := resealed(data, func(b []byte) []byte { copy(b[len(b)-3*os.Getpagesize():], make([]byte, 3*os.Getpagesize())); return b })
	tests := map[string]struct {
		data   []byte
		want   error
		says   string
		adjust func(*RestoreOptions)
	}{
		"nothing":               {data: nil, want: ErrBackup, says: "does not begin"},
		"a store's own file":    {data: store, want: ErrBackup, says: "does not begin"},
		"the first line alone":  {data: data[:len(backupMagic)], want: ErrBackup, says: "header is cut off"},
		"no header":             {data: append([]byte(backupMagic), "{}\n"...), want: ErrBackup, says: "header cannot be read"},
		"a header without end":  {data: append([]byte(backupMagic), bytes.Repeat([]byte("x"), 1<<20)...), want: ErrBackup, says: "header has more"},
		"half of it":            {data: data[:len(data)/2], want: ErrBackup, says: "was cut off; take another one"},
		"without its digest":    {data: data[:len(data)-sha256.Size], want: ErrBackup, says: "digest is missing"},
		"without its last byte": {data: data[:len(data)-1], want: ErrBackup, says: "digest is missing"},
		"more than it":          {data: append(bytes.Clone(data), 0), want: ErrBackup, says: "something follows"},
		"a bit that changed":    {data: flipped, want: ErrBackup, says: "SHA-256"},
		"a damaged store":       {data: damaged, want: ErrBackup},
		"a newer schema": {data: resealed(data, func(b []byte) []byte { return bytes.Replace(b, []byte(`"schema":2`), []byte(`"schema":3`), 1) }),
			want: ErrSchema, says: "Restore it with the meshca that made it"},
		"a header of another": {data: resealed(data, func(b []byte) []byte { return bytes.Replace(b, []byte(`"generation":3`), []byte(`"generation":4`), 1) }),
			want: ErrBackup, says: "do not belong together"},
		"another trust domain": {data: data, want: ca.ErrTrustDomain, says: `of trust domain "example.org", the configuration says "other.test"`,
			adjust: func(o *RestoreOptions) { o.TrustDomain = "other.test" }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "meshca.db")
			if tt.adjust == nil {
				tt.adjust = func(*RestoreOptions) {}
			}
			_, err := restore(t, tt.data, path, tt.adjust)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v", err)
			}
			if exists(path) {
				t.Error("a store is there")
			}
		})
	}
}

func FuzzExtract(f *testing.F) {
	seed := []byte(backupMagic + `{"size":4,"schema":1}` + "\nabcd")
	sum := sha256.Sum256(seed)
	f.Add(append(seed, sum[:]...))
	f.Add([]byte(backupMagic + `{"size":-1}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		h, err := extract(bytes.NewReader(data), &out)
		if err == nil && (h.Size != int64(out.Len()) || h.Size <= 0 || h.Schema > SchemaVersion) {
			t.Errorf("%+v with %d bytes", h, out.Len())
		}
		if out.Len() > len(data) {
			t.Errorf("%d bytes of %d", out.Len(), len(data))
		}
	})
}

// A store that stands is replaced when that was said, nobody uses it, and the backup knows all that it decided.
func TestRestoreOverAStore(t *testing.T) {
	s, path := decided(t)
	old := backup(t, s)
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "c"}}))
	if _, err := restore(t, old, path, accepting); !errors.Is(err, ErrInUse) {
		t.Errorf("over a store that is in use: %v", err)
	}
	closed(t, s)
	if _, err := restore(t, old, path); !errors.Is(err, ErrExists) {
		t.Errorf("without being told to replace it: %v", err)
	}
	before, err := os.ReadFile(path)
	must(t, err)
	// Nothing was decided since.
	r, err := restore(t, old, path, replacing)
	must(t, err)
	if kept, err := os.ReadFile(r.Aside); err != nil || !bytes.Equal(kept, before) || !strings.HasPrefix(r.Aside, path+".replaced-") {
		t.Errorf("what stood is not kept at %q: %v", r.Aside, err)
	}
	s = opened(t, path)
	if n, err := s.LedgerSize(t.Context()); err != nil || n != 2 {
		t.Errorf("%d entries, %v", n, err)
	}
	// A newer backup over an older store.
	must(t, s.SwapBundle(t.Context(), 1, bundleOf(2)))
	_, err = s.DeleteDenial(t.Context(), "spiffe://example.org/thief")
	must(t, err)
	newer := backup(t, s)
	closed(t, s)
	must(t, os.Remove(r.Aside))
	if r, err = restore(t, old, path, accepting); err != nil || r.Behind == nil {
		t.Fatalf("%+v, %v", r, err)
	}
	must(t, os.Remove(path))
	_, err = restore(t, old, path)
	must(t, err)
	must(t, os.Remove(r.Aside))
	if _, err := restore(t, newer, path, replacing); err != nil {
		t.Errorf("a newer backup over an older store: %v", err)
	}
}

func TestRestoreOfAnOlderOne(t *testing.T) {
	for name, tt := range map[string]struct {
		since func(*testing.T, *Store)
		says  string
	}{
		"the bundle": {func(t *testing.T, s *Store) { must(t, s.SwapBundle(t.Context(), 1, bundleOf(5))) }, "the trust bundle would go back from sequence 5 to 1"},
		"the rollout": {func(t *testing.T, s *Store) {
			must(t, s.SwapRollout(t.Context(), 1, rotation.Rollout{Step: rotation.StepSigning}))
		}, `the rollout of roots from "signing" (change 2) to "out" (change 1)`},
		"a denial": {func(t *testing.T, s *Store) {
			must(t, s.PutDenial(t.Context(), ca.Denial{ID: "spiffe://example.org/new"}))
		}, "1 denials would be forgotten, of spiffe://example.org/new"},
		"an order":     {func(t *testing.T, s *Store) { must(t, s.SetRenewOrders(t.Context(), []ca.RenewOrder{{}})) }, "orders between state 3 and 4 would be forgotten"},
		"another life": {forked, "they went on differently"},
	} {
		t.Run(name, func(t *testing.T) {
			s, path := decided(t)
			old := backup(t, s)
			tt.since(t, s)
			seen, _ := s.Mark()
			denied, err := s.Denials(t.Context())
			must(t, err)
			closed(t, s)
			before, err := os.ReadFile(path)
			must(t, err)
			var behind *Behind
			if _, err := restore(t, old, path, replacing); !errors.As(err, &behind) || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("got %v, want %q", err, tt.says)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("what was refused changed the store: %v", err)
			}
			r, err := restore(t, old, path, accepting)
			must(t, err)
			if r.Behind == nil {
				t.Error("what was accepted is not told")
			}
			// What was denied stays so, and the bundle and the marks go on beyond what agents saw.
			s = opened(t, path)
			defer closed(t, s)
			if now, err := s.Denials(t.Context()); err != nil || len(now) != len(denied) {
				t.Errorf("denied were %v, and are %v (%v)", denied, now, err)
			}
			b, err := s.Bundle(t.Context())
			if err != nil || b.Sequence <= seen.Bundle || !bytes.Equal(b.JSON, bundleOf(1).JSON) {
				t.Errorf("the bundle is %d %s, %v", b.Sequence, b.JSON, err)
			}
			now, _ := s.Mark()
			h, err := s.History(t.Context())
			if err != nil || now.Generation <= seen.Generation || now.Bundle != b.Sequence || h.Floor != b.Sequence || h.Loss != nil {
				t.Errorf("it goes on at %+v behind %+v, history %+v, %v", now, seen, h, err)
			}
			if has, err := s.HasMark(t.Context(), seen); err != nil || !has {
				t.Errorf("who followed the store that was replaced is held to be of another one: %v", err)
			}
		})
	}
}

// forked makes of s what a restored backup and another decision would be: the same generation, reached otherwise.
func forked(t *testing.T, s *Store) {
	t.Helper()
	must(t, s.db.Update(func(tx *bbolt.Tx) error {
		m, err := newestMark(tx)
		m.Tag[0]++
		return errors.Join(err, putMark(tx.Bucket(bucketMarks), m))
	}))
	s.mark.Set(ca.Mark{Generation: 3})
}

// Stores of builds that made no marks are compared by what they hold.
func TestRestoreOverAStoreWithoutMarks(t *testing.T) {
	s, path := decided(t)
	old := backup(t, s)
	must(t, s.SwapBundle(t.Context(), 1, bundleOf(2)))
	must(t, s.db.Update(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketMarks) }))
	closed(t, s)
	if _, err := restore(t, old, path, replacing); err == nil || !strings.Contains(err.Error(), "from sequence 2 to 1") {
		t.Errorf("got %v", err)
	}
}

// A store that cannot be read may have decided anything: that must be accepted.
func TestRestoreOverADamagedStore(t *testing.T) {
	for name, harm := range map[string]func([]byte) []byte{
		"emptied":      func(b []byte) []byte { return make([]byte, len(b)) },
		"cut off":      func(b []byte) []byte { return b[:2*os.Getpagesize()] },
		"with no data": func(b []byte) []byte { clear(b[2*os.Getpagesize():]); return b },
	} {
		t.Run(name, func(t *testing.T) {
			s, path := decided(t)
			old := backup(t, s)
			closed(t, s)
			data, err := os.ReadFile(path)
			must(t, err)
			broken := harm(data)
			must(t, os.WriteFile(path, broken, 0o600))
			if _, err := restore(t, old, path, replacing); !errors.Is(err, ErrUnreadable) {
				t.Errorf("got %v", err)
			}
			r, err := restore(t, old, path, accepting)
			must(t, err)
			if kept, err := os.ReadFile(r.Aside); err != nil || !bytes.Equal(kept, broken) {
				t.Errorf("it was not kept: %v", err)
			}
			closed(t, opened(t, path))
		})
	}
}

// A root that has retired by the backup may have signed again since, which the ledger does not know: it stays for as long as that
// can live, also where no store stood.
func TestARestoredRolloutKnowsThatItsLedgerIsShort(t *testing.T) {
	for _, c := range []struct {
		step   rotation.Step
		end    time.Duration
		lifted bool
	}{
		{rotation.StepRetired, time.Minute, true},
		{rotation.StepRetired, 2 * ca.MaxTTL, false},
		{rotation.StepSigning, time.Minute, false},
	} {
		s, _ := decided(t)
		_, version, err := s.Rollout(t.Context())
		must(t, err)
		now := time.Now()
		journal := rotation.Rollout{Old: rotation.Party{ID: "A"}, New: rotation.Party{ID: "B"}, NewShare: 100, Step: c.step, LastEnd: now.Add(c.end)}
		must(t, s.SwapRollout(t.Context(), version, journal))
		data := backup(t, s)
		path := filepath.Join(t.TempDir(), "meshca.db")
		told, err := restore(t, data, path)
		must(t, err)
		restored := opened(t, path)
		defer closed(t, restored)
		r, changes, err := restored.Rollout(t.Context())
		must(t, err)
		end := r.LastEnd.Sub(now)
		if lifted := end >= ca.MaxTTL && end < ca.MaxTTL+time.Minute; lifted != c.lifted || !lifted && !r.LastEnd.Equal(journal.LastEnd) || changes != version+1 ||
			r.Step != c.step || !told.State.Rollout.LastEnd.Equal(r.LastEnd) {
			t.Errorf("%s, until %s: after change %d (of %d) it is %+v, told %s", c.step, c.end, changes, version+1, r, told.State.Rollout.LastEnd)
		}
	}
}

// A taint is for good: an old backup does not lift it, and says what it does not know.
func TestRestoreForgetsNoTaint(t *testing.T) {
	s, path := decided(t)
	old := backup(t, s)
	before, version, err := s.Rollout(t.Context())
	must(t, err)
	stood := rotation.Rollout{
		Old: rotation.Party{ID: "A"}, New: rotation.Party{ID: "B"}, NewShare: 100, Step: rotation.StepOut,
		Taints: []rotation.Taint{{ID: "A", Key: "key of A", At: time.Now(), By: "op"}}, Gone: []string{"A"},
	}
	must(t, s.SwapRollout(t.Context(), version, stood))
	closed(t, s)
	if _, err := restore(t, old, path, replacing); err == nil || !strings.Contains(err.Error(), "1 taints would be forgotten, of the roots A") {
		t.Errorf("got %v", err)
	}
	_, err = restore(t, old, path, accepting)
	must(t, err)
	s = opened(t, path)
	defer closed(t, s)
	now, changes, err := s.Rollout(t.Context())
	must(t, err)
	_, tainted := now.Tainted("A")
	_, key := now.TaintedKey("key of A")
	if !tainted || !key || !now.Leaves("A") || now.Step != before.Step || now.New != before.New || changes <= version+1 {
		t.Errorf("after change %d the journal is %+v", changes, now)
	}
}
