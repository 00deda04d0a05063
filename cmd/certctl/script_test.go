package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/admin"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/ca"
)

var update = flag.Bool("update", false, "write the scripts' expected outputs anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"certctl": func() {
			if os.Getenv("COLOUR")+os.Getenv("ASKING")+os.Getenv("WATCH_EVERY") == "" {
				main()
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
			c := &cli{in: os.Stdin, out: os.Stdout, err: os.Stderr, now: time.Now, colour: os.Getenv("COLOUR") != "", asking: os.Getenv("ASKING") != ""}
			c.every, _ = time.ParseDuration(os.Getenv("WATCH_EVERY"))
			code := c.run(ctx, os.Args[1:])
			stop()
			os.Exit(code)
		},
	})
}

// TestScripts runs testdata/*.txtar: the real program, against the real admin and SDS servers over unix sockets, with
// small stand-ins behind them.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata", UpdateScripts: *update, RequireUniqueNames: true, RequireExplicitExec: true,
		Setup: setup,
		Condition: func(c string) (bool, error) {
			if c != "root" {
				return false, fmt.Errorf("unknown condition %q", c)
			}
			return os.Getuid() == 0, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"tidy": tidy, "audited": audited, "exit": exitCode, "mode": mode},
	})
}

// setup gives each script its own CA ($CA), five more ($ROLLING and $WAITING with a rollout that waits, $LAGGING with an agent
// that is away, $SEALED with an upstream that does not answer, $RESTORED with an old store), agents ($AGENT, and $TROUBLED with a
// denied workload), SDS sockets ($SDS,
// $SDS_ENDED, $SDS_EMPTY, $SDS_DENIED) and TLS server ($TLS), and files of certificates.
func setup(env *testscript.Env) error {
	f, err := newFacts()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	env.Defer(stop)
	path := func(name string) string { return filepath.Join(env.WorkDir, name) }

	rolling, err := f.rolling()
	if err != nil {
		return err
	}
	waiting, err := f.rolling()
	if err != nil {
		return err
	}
	restored := f.roots(0)
	restored.loss = &ca.Loss{Mark: ca.Mark{Generation: 41, Bundle: 9}, Agent: agentID + "n1", Since: f.at(-time.Minute)}
	sealed := f.roots(0, f.agent("n1", 0, true))
	sealed.upstreamErr = errors.New("vault is sealed")
	for name, x := range map[string]*roots{
		"ca.sock": f.roots(0, f.agent("n1", 0, true)), "rolling.sock": rolling, "waiting.sock": waiting,
		"lagging.sock": f.roots(2, f.agent("n1", 0, true), f.agent("n2", 3, false)), "sealed.sock": sealed, "restored.sock": restored,
	} {
		ca, err := f.caServer(x)
		if err != nil {
			return err
		}
		l, err := admin.Listen(ctx, path(name))
		if err != nil {
			return err
		}
		go func() { _ = ca.Serve(ctx, l) }()
	}

	agent := grpc.NewServer()
	meshcav1.RegisterAgentAdminServiceServer(agent, &agentServer{facts: f})
	if err := serve(env, agent, path("agent.sock")); err != nil {
		return err
	}
	troubled := grpc.NewServer()
	meshcav1.RegisterAgentAdminServiceServer(troubled, &agentServer{facts: f, workloads: f.troubled(path("denied.sock"))})
	if err := serve(env, troubled, path("troubled.sock")); err != nil {
		return err
	}
	for _, name := range []string{"agent.sock", "troubled.sock"} {
		if err := os.Chmod(path(name), 0o600); err != nil {
			return err
		}
	}
	hung, err := net.ListenUnix("unix", &net.UnixAddr{Name: path("hung.sock"), Net: "unix"}) // who connects is never answered
	if err != nil {
		return err
	}
	env.Defer(func() { _ = hung.Close() })
	for name, s := range map[string]*sds.Secrets{"sds.sock": f.secrets, "ended.sock": f.ended, "empty.sock": nil, "denied.sock": f.rootsAlone} {
		engine, err := sds.New(sds.Config{Source: func(context.Context) (sds.Source, error) {
			return sds.SourceFunc(func() (*sds.Secrets, <-chan struct{}) { return s, nil }), nil
		}})
		if err != nil {
			return err
		}
		server := grpc.NewServer()
		secretv3.RegisterSecretDiscoveryServiceServer(server, engine)
		if err := serve(env, server, path(name)); err != nil {
			return err
		}
	}
	address, err := tlsServer(env, f)
	if err != nil {
		return err
	}
	for name, data := range f.files() {
		if err := os.WriteFile(path(name), data, 0o600); err != nil {
			return err
		}
	}
	env.Values[auditKey{}] = f
	env.Setenv("CA", "--socket="+path("ca.sock"))
	env.Setenv("ROLLING", "--socket="+path("rolling.sock"))
	env.Setenv("WAITING", "--socket="+path("waiting.sock"))
	env.Setenv("LAGGING", "--socket="+path("lagging.sock"))
	env.Setenv("RESTORED", "--socket="+path("restored.sock"))
	env.Setenv("SEALED", "--socket="+path("sealed.sock"))
	env.Setenv("ROOT", fingerprint(f.authority.cert.Raw))
	env.Setenv("NEXT", fingerprint(f.stranger.cert.Raw))
	env.Setenv("AGENT", "--agent="+path("agent.sock"))
	env.Setenv("TROUBLED", "--agent="+path("troubled.sock"))
	env.Setenv("SDS_DENIED", path("denied.sock"))
	env.Setenv("SDS", path("sds.sock"))
	env.Setenv("SDS_ENDED", path("ended.sock"))
	env.Setenv("SDS_EMPTY", path("empty.sock"))
	env.Setenv("TLS", address)
	return nil
}

type auditKey struct{}

func serve(env *testscript.Env, s *grpc.Server, path string) error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	go func() { _ = s.Serve(l) }()
	env.Defer(s.Stop)
	return nil
}

// tlsServer shows the SVID and insists on a client certificate, which certctl does not have.
func tlsServer(env *testscript.Env, f *facts) (string, error) {
	cert := tls.Certificate{PrivateKey: f.svid.PrivateKey}
	for _, c := range f.svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS12})
	if err != nil {
		return "", err
	}
	env.Defer(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, conn); _ = conn.Close() }()
		}
	}()
	return l.Addr().String(), nil
}

func (f *facts) files() map[string][]byte {
	key, _ := x509.MarshalPKCS8PrivateKey(f.svid.PrivateKey)
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	other, _ := x509.MarshalPKCS8PrivateKey(f.authority.key)
	chain := encodePEM(f.svid.Certificates)
	bundle, _ := f.bundle.Marshal()
	return map[string][]byte{
		"svid.pem": chain, "both.pem": append(bytes.Clone(keyPEM), chain...),
		"wrongkey.pem": append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: other}), chain...),
		"leaf.der":     f.svid.Certificates[0].Raw, "root.pem": encodePEM([]*x509.Certificate{f.authority.cert}),
		"reversed.pem": encodePEM([]*x509.Certificate{f.svid.Certificates[1], f.svid.Certificates[0]}),
		"bundle.json":  bundle, "otherroot.pem": encodePEM([]*x509.Certificate{f.stranger.cert}), "website.pem": encodePEM([]*x509.Certificate{f.website}),
		"expired.pem": encodePEM(f.expired), "key.pem": keyPEM, "domain.txt": []byte("mesh.example\n"), "root.id": []byte(shortID(fingerprint(f.authority.cert.Raw)) + "\n"),
	}
}

// tidy writes the last command's output (or its second argument) to the file `out`, with what changes from run to run
// made the same: moments, serials and hashes, paths, "3s ago".
func tidy(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 1 {
		ts.Fatalf("usage: tidy [file]")
	}
	name := "stdout"
	if len(args) == 1 {
		name = args[0]
	}
	s := ts.ReadFile(name)
	for _, r := range tidying {
		s = r.what.ReplaceAllString(s, r.as)
	}
	if f, ok := ts.Value(auditKey{}).(*facts); ok { // as wide as they are
		s = strings.ReplaceAll(s, shortID(fingerprint(f.authority.cert.Raw)), "MESH-ROOT-ID")
		s = strings.ReplaceAll(s, shortID(fingerprint(f.stranger.cert.Raw)), "NEXT-ROOT-ID")
	}
	s = regexp.MustCompile(regexp.QuoteMeta(ts.Getenv("WORK"))).ReplaceAllString(s, "$$WORK")
	s = regexp.MustCompile(regexp.QuoteMeta(ts.Getenv("TLS"))).ReplaceAllString(s, "$$TLS")
	ts.Check(os.WriteFile(ts.MkAbs("out"), []byte(s), 0o600))
}

var tidying = []struct {
	what *regexp.Regexp
	as   string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ`), "YYYY-MM-DD hh:mm:ssZ"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "SHA256"},
	{regexp.MustCompile(`\b[0-9a-f]{40}\b`), "KEYID"},
	{regexp.MustCompile(`\b[0-9a-f]{30,32}\b`), "SERIAL"},
	{regexp.MustCompile(`\bnow\b \(|\b\d+s ago \(`), "just now ("},
	{regexp.MustCompile(`since \d+s \(`), "since 0s ("},
	{regexp.MustCompile(`uid \d+`), "uid N"},
	{regexp.MustCompile(`"[A-Za-z0-9+/=_-]{100,}"`), `"BASE64"`},
	{regexp.MustCompile(`(?s)-----BEGIN CERTIFICATE-----.*-----END CERTIFICATE-----(\\n|\n)`), "PEM$1"},
}

// exit runs certctl and holds it to an exit code: exit 3 certctl status.
func exitCode(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exit CODE command...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = regexp.MustCompile(`\d+$`).FindString(err.Error())
	}
	if got != args[0] {
		ts.Fatalf("exit code %s (%v), want %s", got, err, args[0])
	}
}

// audited looks for a pattern in the CA's audit lines.
func audited(ts *testscript.TestScript, neg bool, args []string) {
	f, ok := ts.Value(auditKey{}).(*facts)
	if !ok || len(args) != 1 {
		ts.Fatalf("usage: [!] audited PATTERN")
	}
	if found := regexp.MustCompile(args[0]).MatchString(f.audited()); found == neg {
		ts.Fatalf("audit lines, looking for %s (not: %t):\n%s", args[0], neg, f.audited())
	}
}

// mode holds a file to its permissions: mode 600 key.pem.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := strconv.FormatUint(uint64(info.Mode().Perm()), 8); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }
