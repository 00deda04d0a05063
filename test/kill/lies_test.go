package kill

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// insert is code that only the copy has: a failpoint that does something else than to stand.
type insert struct{ name, file, before, text string }

const (
	// lingers keeps a Rollout in a step for as long as it names that: as a step that cannot go on. lingersToo is another one.
	lingers    = "lingers"
	lingersToo = "lingersToo"
	lying      = "return()"
)

func lingering(name string) insert {
	return insert{name, "rotation/roller.go", "\tfailed := func(err error) (Rollout, Standing)", fmt.Sprintf(`	// gofail: var %s string
	// if %[1]s == "any" || %[1]s == string(r.Step) { return r, Standing{Waits: []string{"the test"}} }
`, name)}

}

// lies are faults of a CA that it does not know of. Each is in the copy, and does nothing before it is told.
var lies = []insert{
	{"asksNobody", "ca/rollout/roots.go", "\tnow := x.c.Now()\n\tcounting := now\n", "\t// gofail: var asksNobody struct{}\n\t// return nil, nil\n"},
	{"signsOnceItIsPublished", "ca/rollout/roots.go", "\tswitch {\n\tcase r.Step == \"\":",
		"\t// gofail: var signsOnceItIsPublished struct{}\n\t// if r.Step == rotation.StepPublished { return ca.Assignment{Root: root(r.New)} }\n"},
	{"waitsForNothing", "ca/rollout/roots.go", "\tnow, end := x.c.Now(), time.Time{}\n", "\t// gofail: var waitsForNothing struct{}\n\t// return x.c.Now(), nil\n"},
	{"renewsNothing", "ca/rollout/roots.go", "\tif err := x.c.Renewals.RenewAll(", "\t// gofail: var renewsNothing struct{}\n\t// return end, nil\n"},
	{"renewsLate", "ca/rollout/roots.go", "\tif err := x.c.Renewals.RenewAll(", "\t// gofail: var renewsLate struct{}\n" +
		"\t// go func() { time.Sleep(2 * r.Within); _ = x.c.Renewals.RenewAll(ctx, mark(r), renewalShare(r.Within)) }()\n\t// return end, nil\n"},
	{"withdrawsAtOnce", "rotation/rollout.go", "\tif r.Within == 0 {\n\t\treturn r.LastEnd\n", "\t// gofail: var withdrawsAtOnce struct{}\n\t// return r.Entered\n"},
	{"signsForAll", "ca/authority.go", "\tif p.successor != nil && rotation.InShare(",
		"\t// gofail: var signsForAll struct{}\n\t// if p.successor != nil { return p.successor.signer(life) }\n"},
	{"recordsAnotherRoot", "ca/issuer.go", "\treturn LedgerEntry{\n",
		"\t// gofail: var recordsAnotherRoot struct{}\n\t// { another := *s; another.rootSum[0]++; s = &another }\n"},
	{"keepsTheIntermediate", "ca/rollout/intermediate.go", "\tfor _, l := range lines {\n\t\tif end := l.Status().NotAfter",
		"\t// gofail: var keepsTheIntermediate struct{}\n\t// lines = nil\n"},
}

// inserts are all, by the package that they go to.
func inserts(pkg string) (all []insert) {
	for _, i := range append([]insert{lingering(lingers), lingering(lingersToo)}, lies...) {
		if filepath.Dir(i.file) == pkg {
			all = append(all, i)
		}
	}
	return all
}

// put writes it into the copy of its package.
func (i insert) put(dir string) error {
	file := filepath.Join(dir, filepath.Base(i.file))
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if n := strings.Count(string(text), i.before); n != 1 {
		return fmt.Errorf("%s: %q stands in it %d times: the place of %s has moved", i.file, i.before, n, i.name)
	}
	// Between empty lines: gofail takes comments that follow one of its own for code.
	return os.WriteFile(file, []byte(strings.Replace(string(text), i.before, "\n"+i.text+"\n"+i.before, 1)), 0o600)
}

// A CA that signs early or retires early, whatever its own journal and ledger say of that, is found out by the witness.
func TestTheWitnessFindsOut(t *testing.T) {
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	for _, c := range []struct {
		lie string
		variant
		dies fault
		want error
	}{
		{lie: "asksNobody", variant: variant{short, []order{rotate(0)}, second}, want: errEarly},
		{lie: "signsOnceItIsPublished", variant: variant{short, []order{rotate(0)}, second}, dies: fault{"rolloutStepEntered", 1}, want: errEarly},
		{lie: "waitsForNothing", variant: variant{settings{ttl: 20 * time.Second}, []order{rotate(0)}, second}, want: errRemoved},
		{lie: "withdrawsAtOnce", variant: variant{settings{ttl: time.Minute}, []order{taint("", theFirst)}, second}, want: errRemoved},
		{lie: "renewsNothing", variant: variant{settings{ttl: 20 * time.Minute}, []order{taint("", theFirst)}, second}, want: errHandshake},
		{lie: "renewsLate", variant: variant{settings{ttl: 20 * time.Minute}, []order{taint("", theFirst)}, second}, want: errHandshake},
		{lie: "signsForAll", variant: variant{short, []order{rotate(share), goOn()}, second}, want: errShare},
		{lie: "recordsAnotherRoot", variant: variant{short, []order{rotate(0)}, second}, want: errLedger},
		{lie: "keepsTheIntermediate", variant: variant{kept(short), []order{replaceIntermediates("", time.Second)}, first}, want: errReplaced},
	} {
		running.Go(func() {
			t.Run(c.lie, func(t *testing.T) {
				d, end := begin(t, b, c.variant, course{now: c.dies, lie: c.lie, slow: []time.Duration{0, 6 * time.Second}})
				defer end()
				if d == nil {
					return
				}
				err := d.run(t.Context())
				if err == nil {
					err = d.conclude(t.Context())
				}
				d.kill()
				_, found := d.inspect(t.Context())
				err = errors.Join(err, found)
				if !errors.Is(err, c.want) {
					t.Errorf("the witness found %v, want %v", err, c.want)
				}
				t.Log(err)
			})
		})
	}
	running.Wait()
}
