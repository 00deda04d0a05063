// Command meshca-agent keeps the SVIDs of a node's workloads and serves them over SDS.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// execute runs a command line and returns its exit code: 0, 1 for what failed, 2 for what was called wrongly.
func execute(ctx context.Context, args []string, out, stderr io.Writer) int {
	root := command()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "meshca-agent:", err)
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// usageError is a fault of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "meshca-agent",
		Short:         "Keeps the SVIDs of a node's workloads fresh and serves them over SDS",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          arguments(cobra.NoArgs),
		Run:           func(c *cobra.Command, _ []string) { _ = c.Help() },
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w: see `%s --help`", err, c.CommandPath())}
	})
	config := &cobra.Command{Use: "config", Short: "Work with configuration files"}
	config.AddCommand(checkCommand())
	root.AddCommand(runCommand(), config, &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  arguments(cobra.NoArgs),
		Run:   func(c *cobra.Command, _ []string) { fmt.Fprintln(c.OutOrStdout(), "meshca-agent", version) },
	})
	return root
}

// arguments marks what a check of the arguments finds as a fault of the command line.
func arguments(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return usageError{fmt.Errorf("%w: see `%s --help`", err, c.CommandPath())}
		}
		return nil
	}
}

func runCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "run --config FILE",
		Short: "Run the agent",
		Args:  arguments(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if file == "" {
				return usageError{errors.New("run needs --config FILE")}
			}
			config, err := loadConfig(file)
			if err != nil {
				return err
			}
			return run(c.Context(), config, c.ErrOrStderr())
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	_ = c.MarkFlagFilename("config", "yaml", "yml")
	return c
}

func checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Say whether a configuration file would be accepted",
		Args:  arguments(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			config, err := loadConfig(args[0])
			if err != nil {
				return err
			}
			pods := ""
			if config.CSI.Enabled {
				pods = ", and those of pods by CSI volumes"
			}
			fmt.Fprintf(c.OutOrStdout(), "%s: fine (trust domain %s, cluster %s, %d workloads%s)\n",
				args[0], config.TrustDomain, config.Cluster, len(config.Workloads), pods)
			return nil
		},
	}
}
