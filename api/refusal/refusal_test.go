package refusal_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/refusal"
)

// Each constant of the enum has a code and both sentences, and nothing else is in the table.
func TestEveryReasonSaysWhatToDo(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "reasons.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	declared := map[refusal.Reason]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		if lit, ok := spec.Values[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
			name, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			declared[refusal.Reason(name)] = true
		}
		return true
	})
	spelling := regexp.MustCompile(`^[A-Z0-9]+(_[A-Z0-9]+)*$`)
	for r := range declared {
		switch {
		case !r.Known():
			t.Errorf("%s is not in the table", r)
		case !spelling.MatchString(string(r)):
			t.Errorf("%s is not spelled as the others", r)
		case !strings.HasSuffix(r.What(), ".") || !strings.HasSuffix(r.Do(), "."):
			t.Errorf("%s: its sentences do not end: %q, %q", r, r.What(), r.Do())
		case r.Code() == codes.OK || r.Code() == codes.Unknown:
			t.Errorf("%s travels as %s", r, r.Code())
		}
	}
	for _, r := range refusal.All() {
		if !declared[r] {
			t.Errorf("%s is in the table and has no constant", r)
		}
	}
}

// What the CA and the agent both say is true of either.
func TestReasonsOfBothSpeakOfBoth(t *testing.T) {
	for _, r := range []refusal.Reason{refusal.Stopping, refusal.CallEnded, refusal.Internal} {
		if text := r.What() + " " + r.Do(); !strings.Contains(text, "CA") || !strings.Contains(text, "agent") {
			t.Errorf("%s: %q", r, text)
		}
	}
	if do := refusal.SocketInUse.Do(); !strings.Contains(do, "the other agent") || !strings.Contains(do, "a pod") || !strings.Contains(do, "`readOnly: true`") {
		t.Errorf("%s is an agent's, and at the shared socket a pod's doing: %q", refusal.SocketInUse, do)
	}
}

// A dependency that is down is Unavailable, an overload ResourceExhausted; neither is ever a final no.
func TestWhatPassesIsNeverFinal(t *testing.T) {
	for r, passing := range map[refusal.Reason]bool{
		refusal.KubernetesUnavailable: true, refusal.KeysUnavailable: true, refusal.IssuerEnding: true, refusal.LedgerUnavailable: true,
		refusal.StoreUnavailable: true, refusal.UpstreamUnavailable: true, refusal.Overloaded: true, refusal.PeerLimit: true, refusal.PodLimit: true,
		refusal.TokenExpired: false, refusal.PolicyNoRule: false, refusal.PodNotOnNode: false, refusal.CSRAsksMore: false,
	} {
		if r.Passing() != passing {
			t.Errorf("%s: passing is %v", r, !passing)
		}
	}
}

func TestTheWireAndBack(t *testing.T) {
	sent := refusal.New(refusal.PodNotOnNode, "pod %s", "a/b").On("kubernetes.io.node.uid").After(3 * time.Second)
	err := refusal.Status(fmt.Errorf("wrapped: %w", sent))
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("it travels as %s", status.Code(err))
	}
	got, ok := refusal.From(err)
	if !ok || got.Reason != sent.Reason || got.Detail != sent.Detail || got.RetryAfter != sent.RetryAfter {
		t.Errorf("sent %+v, got %+v", sent, got)
	}
	if got.Claim != "" {
		t.Error("the claim left the CA")
	}
	if _, ok := refusal.From(status.Error(codes.PermissionDenied, "another system's")); ok {
		t.Error("a status of another system passed for a refusal")
	}
}

func TestWhatIsNoRefusalKeepsItsTextHere(t *testing.T) {
	err := refusal.Status(errors.New("/var/lib/secret/path: no such file"))
	if refusal.Of(err) != refusal.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
	for cause, code := range map[error]codes.Code{context.Canceled: codes.Canceled, context.DeadlineExceeded: codes.DeadlineExceeded} {
		if got := status.Code(refusal.Status(fmt.Errorf("x: %w", cause))); got != code {
			t.Errorf("%v travels as %s", cause, got)
		}
		if got := refusal.Of(cause); got != refusal.CallEnded {
			t.Errorf("%v is counted as %s", cause, got)
		}
	}
}

func TestCausesAreKept(t *testing.T) {
	err := fmt.Errorf("x: %w", refusal.New(refusal.StoreUnavailable, "the store: %w", fs.ErrNotExist))
	if !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, refusal.New(refusal.StoreUnavailable, "")) || errors.Is(err, refusal.New(refusal.PodGone, "")) {
		t.Error("the tree of causes is not what was put in")
	}
}

func TestDetailsAreBounded(t *testing.T) {
	e := refusal.New(refusal.CallerUntrusted, "%s", strings.Repeat("é", 50_000)+"\xff")
	if len(e.Detail) > 1024 || !utf8.ValidString(e.Detail) {
		t.Errorf("a detail of %d bytes, valid UTF-8: %v", len(e.Detail), utf8.ValidString(e.Detail))
	}
}

func TestParseIsForgiving(t *testing.T) {
	if r, err := refusal.Parse(" pod-not-on-node "); err != nil || r != refusal.PodNotOnNode {
		t.Errorf("got %s, %v", r, err)
	}
	if _, err := refusal.Parse("NONSENSE"); err == nil || !strings.Contains(err.Error(), "certctl explain") {
		t.Errorf("got %v", err)
	}
}
